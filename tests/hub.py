"""A hub that takes commits and keeps them, in place of `huggingface_hub.HfApi`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest


class Hub:
    """What was asked of it: repositories with their options, and the files of each commit."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        hub = self

        class Api:
            def __init__(self, **options: Any) -> None: ...

            def create_repo(self, repo: str, **options: Any) -> None:
                hub.repos[repo] = options

            def create_commit(self, repo: str, operations: Iterable[Any], **options: Any) -> None:
                hub.commits.append((repo, {each.path_in_repo: _bytes(each.path_or_fileobj) for each in operations}))

        monkeypatch.setattr("huggingface_hub.HfApi", Api)

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the only commit."""
        ((_, files),) = self.commits
        return files


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else Path(content).read_bytes()
