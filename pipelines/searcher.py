"""What all searchers of ours have in common: the tables remember, so Ray has nothing to save."""

from __future__ import annotations

from typing import Any

from ray import tune


class Stateless(tune.search.Searcher):  # type: ignore[misc,unused-ignore]
    """A Ray Tune searcher whose trials are set already and whose state is that of the tables."""

    def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
        """Objectives and space are set already."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the tables remember."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the tables remember."""

    def __getstate__(self) -> dict[str, Any]:
        return {}
