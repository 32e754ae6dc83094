"""The lines of a running sweep."""

from __future__ import annotations

import io

from rich.console import Console

from pipelines.config import TrialConfig
from pipelines.progress import Progress
from tests.pipelines.synthetic import trial


def test_a_resumed_sweep_counts_what_was_finished_before():
    trials = [TrialConfig.parse({"seed": seed, "epochs": 1}) for seed in range(4)]
    names, text = [t.trial_id for t in trials], io.StringIO()
    progress = Progress(trials, Console(file=text, width=200), earlier=names[:2])
    progress.started(names[2])
    progress.finished(trial(names[2]))
    assert text.getvalue().strip().startswith(f"[3/4] {names[2]}")
    # Two trials are this session's, one of them is done: half of its time is left, whatever the earlier ones took.
    assert progress.total == 2 * (1 + 1)
    assert sum(progress.done.values()) == progress.total / 2


def test_who_waited_for_another_process_did_not_compile():
    trial_, text = TrialConfig.parse({"epochs": 1}), io.StringIO()
    progress = Progress([trial_], Console(file=text, width=200))
    progress.compiled(trial_.trial_id, 42.0, waited_s=0.01)
    progress.compiled(trial_.trial_id, 4.0, waited_s=65.0)
    first, second = text.getvalue().splitlines()
    assert first.endswith(f"{trial_.trial_id}  compiled its shape in 42s")
    assert second.endswith(f"{trial_.trial_id}  waited 1m05s for another process with its shape, ready 4s later")
