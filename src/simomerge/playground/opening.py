"""What the playground works with: a base, its experts, a finished model. They come from a model, a run or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simomerge.assembly.experts import check_experts
from simomerge.checkpoints.card import learned_rooms
from simomerge.core.documents import read_json
from simomerge.core.errors import InputError
from simomerge.core.hub import similar
from simomerge.models.model import SimoModel, load
from simomerge.playground.tiny import tiny_experts

DEMO = Path("runs/demo")
"""The run that is opened if nothing is given, where it exists."""


@dataclass(frozen=True)
class Opened:
    """Models to play with.

    Attributes:
        title: What they are, for the head of the page.
        base, experts: What can be merged; no base and no experts if only a finished model is shown.
        model: A finished model; None if there is none.
        rooms: Whether the models were trained on rooms, so that rooms are good samples.
    """

    title: str
    base: SimoModel | None = None
    experts: Mapping[str, SimoModel] = field(default_factory=dict)
    model: SimoModel | None = None
    rooms: bool = False


def open_models(source: str | None, experts: Mapping[str, str], base: str | None = None) -> Opened:
    """Open what the command line names.

    Args:
        source: A model, the folder of a run, or a foundation encoder; None for the run in `DEMO`, or else for three
            tiny experts that are trained once.
        experts: Folders or hub ids of experts by task, in addition to ``source``.
        base: The foundation encoder of the experts. By default, what a model or a run records.

    Raises:
        InputError: Nothing can be opened there, an encoder is given without experts, or the experts do not fit.
    """
    if source is None and not experts:
        return _run(DEMO, base) if (DEMO / "results.json").is_file() else _tiny()
    if source is not None and (Path(source) / "results.json").is_file():
        if experts:
            raise InputError(f"{source} is a run, which has its own experts; leave {next(iter(experts))}=... out.")
        return _run(Path(source), base)
    if source is not None and Path(source).is_dir() and not _is_model(Path(source)):
        raise InputError(
            f"{source}: neither a model (simo.json, config.json) nor a finished run (results.json)."
            f"{similar(source)} simomerge demo makes a run."
        )
    given = None if source is None else load(source)
    if given is not None and not given.tasks:
        if not experts:
            raise InputError(f"{source} is an encoder without heads: add its experts, each as TASK=EXPERT.")
        return _merging(str(source), given, {task: load(name) for task, name in experts.items()}, None)
    loaded = {task: load(name) for task, name in experts.items()}
    if not loaded:
        assert given is not None
        return Opened(Path(str(source)).name, model=given, rooms=learned_rooms(given.provenance))
    foundation = load(base) if base else _recorded_base(given, loaded)
    return _merging(str(source or ", ".join(loaded)), foundation, loaded, given)


def _merging(title: str, base: SimoModel, experts: Mapping[str, SimoModel], model: SimoModel | None) -> Opened:
    checked = check_experts(base, experts)
    return Opened(title, base, checked, model, all(learned_rooms(each.provenance) for each in checked.values()))


def _tiny() -> Opened:
    return Opened("three tiny experts on rooms", load("rooms-base"), tiny_experts(), rooms=True)


def _run(folder: Path, base: str | None) -> Opened:
    """The experts that a run names, their base, and the run's best model if it has one."""
    results = read_json(folder / "results.json", "run the recipe again.", {"recipe": dict, "experts": {str: str}})
    if not results["experts"] or not all((folder / place).is_dir() for place in results["experts"].values()):
        raise InputError(f"{folder}: the run has no experts in stages/; run it again, or give a model.")
    experts = {task: load(folder / place) for task, place in results["experts"].items()}
    best = folder / "model"
    model = load(best) if _is_model(best) else None
    named = base or results["recipe"].get("base")
    foundation = load(named) if named else _recorded_base(None, experts)
    return _merging(str(folder), foundation, experts, model)


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("simo.json", "config.json"))


def _recorded_base(model: SimoModel | None, experts: Mapping[str, SimoModel]) -> SimoModel:
    """The base that the first model records. A base from a folder is recorded without the folder that it was in."""
    records = [each.provenance.get("base", {}) for each in (model, *experts.values()) if each is not None]
    source = next((str(record["source"]) for record in records if record.get("source")), "")
    if not source:
        raise InputError("the experts do not record their base: give it with --base.")
    try:
        return load(source)
    except InputError as error:
        raise InputError(f"the experts' base, {source!r}, is not found from here: give it with --base.") from error
