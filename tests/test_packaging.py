"""What ships: the wheel with its data files, and a cluster.yaml that Ray accepts."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("tune_spaces", "hwcost", "pipelines")
DATA = (".yaml", ".json", ".html", ".j2", ".css", ".js")


@pytest.mark.slow
def test_the_wheel_carries_spaces_profiles_and_templates(tmp_path: Path) -> None:
    """Built from a copy, installed into an empty environment, looked at from there."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("joulemoe-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not any(name.startswith(("tests/", "benchmarks/", "docs/")) for name in names)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, timeout=120)
    look = (
        "import importlib.util, pathlib\n"
        f"for name in {FOLDERS}:\n"
        "    root = pathlib.Path(importlib.util.find_spec(name).submodule_search_locations[0])\n"
        f"    print(*[p.name for p in root.rglob('*') if p.suffix in {DATA}])"
    )
    found = subprocess.run(
        [python, "-c", look], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.split()
    expected = {p.name for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in DATA}
    assert {"quickstart.yaml", "distilgpt2.yaml"} <= expected
    assert set(found) == expected


def test_cluster_yaml_passes_rays_own_validation() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    validate_config(config)
    assert config["head_node_type"] in config["available_node_types"]
    installs = [command for command in config["setup_commands"] if "uv pip install" in command]
    assert any("boto3" in command for command in installs)  # Ray's own line installs it beside the image's Python
