"""Share a model or an adapter on the Hugging Face hub, with a card that says what it is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class Push:
    """Upload a folder (a model or an adapter) to the Hugging Face hub, with a card of what its files say."""

    folder: str
    """folder that `llmtools quantize`, `finetune` or `export` wrote"""
    repo: str
    """owner/name on the hub; it is made if it is not there"""
    private: bool = False
    """make a new repository private"""
    base_name: str | None = None
    """the base model's name on the hub, where the files know only a folder of this machine"""
    results: str | list[str] | None = None
    """file, or list of files, that `llmtools evaluate --json > FILE` wrote for this folder: measures for the card"""
    message: str = "Upload with llmtools"
    """of the commit"""
    dry_run: bool = False
    """print the card and the names of the files that would go, and upload nothing"""


@dataclass(frozen=True)
class Pushed:
    """Where the folder went, or the card that would go with it."""

    repo: str
    url: str | None
    """None where nothing was uploaded"""
    card: str | None = None
    """of a dry run"""
    files: list[str] = field(default_factory=list)
    """those that would go, of a dry run"""
    left_out: list[str] = field(default_factory=list)
    """what would stay here, of a dry run"""

    def __str__(self) -> str:
        if self.card is None:
            return f"{self.repo}: {self.url}"
        lines = [f"{self.repo} would get: {', '.join(self.files)}"]
        lines += [f"these would stay here: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([self.card, *lines])


def push(recipe: Push) -> Pushed:
    """Uploads the folder."""
    from ..checkpoint.model_card import CARD
    from ..checkpoint.upload import check_repo, files_of, push_to_hub, texts_of

    check_repo(recipe.repo)
    folder = Path(recipe.folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder} (looked in {Path.cwd()})")
    files = [recipe.results] if isinstance(recipe.results, str) else recipe.results or []
    results = [_result(Path(name).expanduser(), folder) for name in files]
    if recipe.dry_run:
        texts = texts_of(folder, recipe.repo, base_name=recipe.base_name, results=results)
        kept, left = files_of(folder)
        card = texts.get(CARD) or (folder / CARD).read_text(encoding="utf-8")
        return Pushed(recipe.repo, None, card, sorted({*kept, *texts}), left)
    url = push_to_hub(
        folder,
        recipe.repo,
        private=recipe.private or None,
        base_name=recipe.base_name,
        results=results,
        message=recipe.message,
    )
    return Pushed(recipe.repo, url)


def _result(path: Path, folder: Path) -> dict[str, Any]:
    """One measurement. Raises InputError unless it is one, and of this folder."""
    try:
        result = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not what `llmtools evaluate --json` prints: {error}") from error
    if not {"task", "measure", "value", "model"} <= set(result):
        raise InputError(
            f"{path} is not what `llmtools evaluate --json` prints: it has {', '.join(result) or 'nothing'}"
        )
    measured = result.get("adapter") or result["model"]
    if Path(str(measured)).expanduser().resolve() != folder.resolve():
        raise InputError(f"{path} was measured on {measured}, not on {folder}")
    return result
