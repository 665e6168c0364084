"""Search for the values of a recipe that make one of its rows best, with Optuna.

All trials use one run folder, so stages that they have in common, such as the experts, are done once. Several machines
can work on one study through a storage that all of them can access.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

from simomerge.core.assets import expanded
from simomerge.core.distributed import started_processes
from simomerge.core.environment import install_command
from simomerge.core.errors import DivergedError, InputError
from simomerge.core.files import atomic_write_text
from simomerge.core.progress import progress
from simomerge.core.text import first_line
from simomerge.recipes.file import read_recipe
from simomerge.recipes.recipe import Recipe
from simomerge.recipes.row import joint_row
from simomerge.recipes.run import held_out_delta, inputs_of
from simomerge.recipes.space import SearchSettings, suggest
from simomerge.training.cluster import pool_of
from simomerge.training.run_folder import RunFolder

_STORAGE, _RESULTS = "search.log", "search.json"
"""Files in the folder of a search: the study, unless it has another storage, and its trials."""


def search_recipe(
    path: str | Path,
    folder: str | Path | RunFolder,
    changes: Sequence[str] = (),
    storage: str | None = None,
    seed: int | None = None,
    workers: int | None = None,
    ray: str | None = None,
) -> dict[str, Any]:
    """Run trials of what the recipe's ``search`` names (`SearchSettings`) until the study has all of them.

    Search learning rates on a logarithmic scale, as the paper does. A study that exists is continued.

    Args:
        path, changes: As `read_recipe` takes them.
        folder: Folder of the stages and of ``search.json``: all trials, the best first. It may be a URL.
        storage: Storage of the study: an Optuna URL, such as ``postgresql://...``, or a file, which may be on a disk
            that several machines share. The default is ``search.log`` in the folder.
        seed: Seed of the sampler. Machines that share a study leave it out, or each takes its own.
        workers: Number of processes within a trial.
        ray: Address of a Ray cluster that does several trials at the same time, see `RayPool`.

    Returns:
        The content of ``search.json``: row, images, and trials with number, state, values, Delta_MTL and its per_seed.

    Raises:
        InputError: Optuna is not installed, the recipe has no search or an impossible one, or no trial was completed.
    """
    if started_processes() > 1:
        raise InputError("a search is shared by starting it on each machine with the same --storage, not by torchrun.")
    optuna = _optuna()
    recipe = read_recipe(path, changes)
    _check(path, changes, recipe)
    folder, search = RunFolder.of(folder), recipe.search
    folder.check()
    study = _study(optuna, storage or str(folder.restored(_STORAGE)), _name(Path(path), recipe, folder), seed)

    def objective(trial: Any) -> float:
        tried = read_recipe(path, changes, suggest(trial, search.space))
        try:
            found = held_out_delta(tried, search.row, search.images, folder, pool)
        except DivergedError as error:  # the sampler learns that the value is too high
            raise optuna.TrialPruned(str(error)) from error
        if not all(map(math.isfinite, found)):
            raise optuna.TrialPruned("its metrics are not finite")
        trial.set_user_attr("per_seed", found)
        return sum(found) / len(found)

    with pool_of(folder, workers, ray) as pool:
        try:
            _optimise(optuna, study, objective, search, folder, pool.slots)
        except InputError:
            raise
        except ValueError as error:  # for example, the stored study has different choices
            raise InputError(f"{path}: the search cannot go on ({error}); take another storage.") from error
    results = _results(study, search)
    if results["trials"][0]["delta_mtl"] is None:
        raise InputError(f"{path}: none of {len(results['trials'])} trials was completed; search lower learning rates.")
    return results


def _optimise(
    optuna: Any, study: Any, objective: Callable[[Any], float], search: SearchSettings, folder: RunFolder, at_once: int
) -> None:
    """Run trials until the study has all of them, ``at_once`` at the same time."""
    here = copy_context()  # trials at the same time are threads, which start without progress and trusted classes
    errors: list[Exception] = []  # Optuna loses those of the last trials at the same time

    def guarded(work: Callable[..., Any], *given: Any) -> Any:
        try:
            return here.copy().run(work, *given)
        except optuna.TrialPruned:
            raise
        except Exception as error:
            errors.append(error)
            study.stop()
            raise

    finished = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    limit = optuna.study.MaxTrialsCallback(search.trials, states=finished)
    left = search.trials - _finished(study)  # the callback stops other machines, but not trials that run here already
    if left <= 0:
        return
    try:
        study.optimize(
            lambda trial: guarded(objective, trial),
            left,
            callbacks=[lambda *_: guarded(_report, study, search, folder), limit],
            n_jobs=min(at_once, left),
        )
    finally:
        if errors:
            raise errors[0]
    if at_once > 1:
        _report(study, search, folder)  # trials at the same time may have written an older state last


def _finished(study: Any) -> int:
    """Number of trials that count: completed or pruned ones."""
    return sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.get_trials(deepcopy=False))


def _report(study: Any, search: SearchSettings, folder: RunFolder) -> None:
    """Write search.json and report progress after each trial."""
    results = _results(study, search)
    atomic_write_text(folder.path / _RESULTS, json.dumps(results, indent=2) + "\n")
    folder.send(_RESULTS, _STORAGE)
    best = results["trials"][0]["delta_mtl"]
    note = "" if best is None else f"best {best:+.2f} %"
    progress("search", min(_finished(study), search.trials), search.trials, note)


def _results(study: Any, search: SearchSettings) -> dict[str, Any]:
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "values": trial.params,
            "delta_mtl": trial.value,
            "per_seed": trial.user_attrs.get("per_seed"),
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    trials.sort(key=lambda trial: (trial["delta_mtl"] is None, -(trial["delta_mtl"] or 0.0), trial["number"]))
    return {"format": 1, "row": search.row, "images": search.images, "trials": trials}


def _check(path: str | Path, changes: Sequence[str], recipe: Recipe) -> None:
    """Reject a search that cannot work, before any trial."""
    search = recipe.search
    if not search.space or not search.row:
        raise InputError(f"{path}: nothing to search; give search: {{row, images, space}} (docs/recipes.md).")
    rows = [*map(joint_row, recipe.joint_weightings), *recipe.merges, *recipe.realigned]
    if search.row not in rows:
        raise InputError(f"{path}: search.row {search.row!r} is not a row of the recipe; it has {', '.join(rows)}.")
    if not 1 <= search.images < recipe.val_images:
        raise InputError(
            f"{path}: search.images is {search.images}; give how many of the {recipe.val_images} val_images"
            " evaluate the trials, such as a quarter."
        )
    fixed = ("seeds", "tasks", "val_images", "base", "data", "data_options")  # all trials must be evaluated alike
    for key in search.space:
        name = key.split(".")[0]
        if name not in Recipe.__dataclass_fields__ or name in fixed:
            raise InputError(
                f"{path}: search.space: {key!r} cannot be searched; name settings of trainings and merges."
            )
    values = {key: given.get("choices") or [given["low"], given["high"]] for key, given in search.space.items()}
    first = {key: each[0] for key, each in values.items()}
    for key, each in values.items():
        for value in each:
            read_recipe(path, changes, {**first, key: value})


def _name(path: Path, recipe: Recipe, folder: RunFolder) -> str:
    """Name of the study. It depends on everything but the number of trials, because other trials cannot be reused."""
    search = recipe.search
    about: dict[str, Any] = {
        "recipe": {key: value for key, value in recipe.to_dict().items() if key != "align_images"},  # which is a path
        **inputs_of(recipe, folder),
        **{key: getattr(search, key) for key in ("row", "images", "space")},
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{path.stem} {search.row} {key}"


def _study(optuna: Any, place: str, name: str, seed: int | None) -> Any:
    """The study in a storage; the sampler of a study that is resumed does not repeat its earlier values."""
    try:
        study = optuna.create_study(
            storage=place if "://" in place else _file_storage(expanded(place)),
            study_name=name,
            load_if_exists=True,
            direction="maximize",
        )
        begun = len(study.get_trials(deepcopy=False))
    except Exception as error:  # the driver of a database may raise anything
        raise InputError(
            f"storage {place}: cannot be used ({first_line(error)}); give a file, or a URL as Optuna takes it."
        ) from error
    study.sampler = optuna.samplers.TPESampler(seed=None if seed is None else (seed + 1_000_003 * begun) % 2**32)
    return study


def _file_storage(path: Path) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(path)))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError(f"a search needs Optuna: {install_command('search')}.") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
