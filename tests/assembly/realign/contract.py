"""The contract of every re-alignment, as tests to inherit.

A test class names the method or preset and gives small parameters. ``recorded`` is what its provenance must hold in
addition to the training settings, ``added`` the number of weights that it trains in addition to the heads' own, and
``trainings`` how often it trains with these settings. A method with ``keeps_heads`` puts something in front of the
experts' heads, which it leaves as they are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from simomerge.assembly.realign import Realignment, get_realignment, realign
from simomerge.assembly.realign.method import TRAINING, TrainedRealignment, realignment_rows
from simomerge.checkpoints import open_checkpoint
from simomerge.cli import cli
from simomerge.core.errors import InputError
from simomerge.core.registry import settings, summary
from simomerge.datasets import DenseDataset, load_data
from simomerge.models.model import SimoModel
from simomerge.recipes.file import recipe_schema
from simomerge.recipes.recipe import Recipe
from simomerge.training.settings import TrainSettings
from simomerge.training.state import TrainingState

SETTINGS = TrainSettings(steps=6, batch_size=4, lr=1e-2, seed=1)
IMAGES = 8
MEASURED = ("ridge", "r2", "r2_before", "distance_ratio", "best_step", "layers_changed", "error", "error_before")
FEW_IMAGES = "ignore:.*the fold stays close to the unfolded head:UserWarning"


def steps_of(file: Path) -> int:
    """The step at which the state of a training was saved."""
    return json.loads(bytes(open_checkpoint(file)["log"].tolist()))["steps"]


class Killed(Exception):
    pass


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def options_of(parameters: Mapping[str, Any]) -> list[str]:
    """The parameters as options of the command line."""
    pairs = ((f"--{key.replace('_', '-')}", value) for key, value in parameters.items())
    return [text for key, value in pairs for text in ([key] if value is True else [key, str(value)])]


@pytest.mark.filterwarnings(FEW_IMAGES)
class RealignmentContract:
    name: ClassVar[str]
    given: ClassVar[dict[str, Any]] = {}
    recorded: ClassVar[dict[str, Any]] = {}
    added: ClassVar[int] = 0
    keeps_heads: ClassVar[bool] = False
    trainings: ClassVar[int] = 1

    @pytest.fixture(autouse=True)
    def _with_base(self, base: SimoModel, tiny_base: Path) -> None:
        self.base, self.base_folder = base, tiny_base

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the method, with the settings of the training one by one."""
        shown = ("steps", "batch_size", "lr", "seed")
        return {**self.given, **({key: getattr(SETTINGS, key) for key in shown} if self.trained else {})}

    @property
    def method(self) -> Realignment:
        return get_realignment(self.name)

    @property
    def trained(self) -> bool:
        return isinstance(self.method, TrainedRealignment)

    def inputs(self, experts: Mapping[str, SimoModel], data: Any) -> dict[str, Any]:
        if self.method.teacher == "labels":
            return {"data": data}
        return {"experts": experts, "images": data, **({"base": self.base} if self.method.needs_base else {})}

    def run(self, model: SimoModel, experts: Mapping[str, SimoModel], data: Any, **more: Any) -> SimoModel:
        return realign(model, **self.inputs(experts, data), method=self.name, **{**self.parameters, **more})

    def refuses(self, message: str, model: SimoModel, method: str | None = None, **inputs: Any) -> None:
        with pytest.raises(InputError, match=message):
            realign(model, method=method or self.name, **{**self.parameters, **inputs})

    # What it returns ------------------------------------------------------------------------------------

    def test_it_returns_a_new_model_and_leaves_the_given_ones(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        models = (merged, *experts.values())
        merged.train()
        next(merged.heads.parameters()).requires_grad_(False)
        modes = [[module.training for module in model.modules()] for model in models]
        learns = [[parameter.requires_grad for parameter in model.parameters()] for model in models]
        before, records = [weights(model) for model in models], copy.deepcopy([model.provenance for model in models])
        result = self.run(merged, experts, rooms)
        assert all(same(old, weights(model)) for old, model in zip(before, models, strict=True))
        assert records == [model.provenance for model in models] and merged.encoder.adapters is None
        assert modes == [[module.training for module in model.modules()] for model in models]
        assert learns == [[parameter.requires_grad for parameter in model.parameters()] for model in models]
        given = {parameter.data_ptr() for model in models for parameter in model.parameters()}
        assert not any(parameter.data_ptr() in given for parameter in result.parameters())
        assert result.tasks == merged.tasks and list(result.tasks) == list(merged.tasks) and not result.training
        for name in merged.tasks:
            before, after = merged.heads[name], result.heads[name]
            if self.keeps_heads:
                assert same(weights(before), weights(after.inner))
                with torch.no_grad():
                    features = result.encode(rooms[0]["image"][None])
                    assert not torch.equal(before.eval()(features), after(features))
            else:
                assert torch.equal(before.output.weight, after.output.weight) != self.method.changes_heads

    def test_frozen_models_change_nothing_and_all_weights_of_the_result_can_be_trained(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        expected = self.run(merged, experts, rooms)
        for model in (merged, *experts.values()):
            model.requires_grad_(False)
        result = self.run(merged, experts, rooms)
        assert same(weights(expected), weights(result))
        assert all(parameter.requires_grad for model in (expected, result) for parameter in model.parameters())

    def test_what_it_says_of_the_encoder_is_true(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        result = self.run(merged, experts, rooms)
        adapters = result.encoder.adapters is not None
        changed = not same(weights(merged.encoder.backbone), weights(result.encoder.backbone))
        assert adapters == self.method.adds_adapters and (changed or adapters) == self.method.changes_encoder
        assert changed == (result.encoder_fingerprint() != merged.encoder_fingerprint())
        assert changed == (self.method.changes_encoder and not adapters)
        assert list(weights(result.encoder.backbone)) == list(weights(merged.encoder.backbone))

    def test_the_provenance_records_what_was_done(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        result = self.run(merged, experts, rooms)
        assert result.provenance["merge"] == {"method": "average"}
        record = dict(result.provenance["realign"])
        assert 0 < record.pop("seconds") < 600
        trained = self.method.changes_heads and not self.keeps_heads
        heads = sum(parameter.numel() for parameter in merged.heads.parameters()) * trained
        labelled = self.method.teacher == "labels"
        images = {"labelled_images": IMAGES * labelled, "unlabelled_images": IMAGES * (not labelled)}
        steps = SETTINGS.steps * (len(merged.tasks) if self.method.trains_heads_apart else self.trainings)
        cost = {"steps": steps, "trained_parameters": heads + self.added} if self.trained else {}
        before = record.pop("after", {}).get("method")
        assert before == ("fold" if self.method.name == "distill" else None)
        assert record == {
            "method": self.method.name,
            **(asdict(SETTINGS) if self.trained else {"trained_parameters": 0, "steps": 0}),
            "changes_encoder": self.method.changes_encoder,
            **images,
            **cost,
            **{key: record[key] for key in MEASURED if key in record},
            **self.recorded,
        }

    def test_it_may_follow_another_re_alignment_unless_it_needs_plain_heads(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        start = realign(merged, data=rooms, method="heads", training=SETTINGS)
        if self.method.needs_plain_heads:
            with pytest.raises(InputError, match="before any re-alignment"):
                self.run(start, experts, rooms)
        else:
            result = self.run(start, experts, rooms)
            assert result.provenance["realign"]["after"] == start.provenance["realign"]
            assert result.provenance["merge"] == {"method": "average"}

    def test_saved_and_loaded_it_predicts_the_same(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset, tmp_path: Path
    ) -> None:
        result = self.run(merged, experts, rooms)
        result.save_pretrained(tmp_path / "scene")
        assert (tmp_path / "scene" / "adapters.safetensors").exists() == self.method.adds_adapters
        again = SimoModel.from_pretrained(tmp_path / "scene")
        assert again.provenance == result.provenance and same(weights(again), weights(result))
        image = rooms[0]["image"]
        expected, without = result.predict(image), merged.predict(image)
        for name, values in again.predict(image).items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)
        assert any(not np.array_equal(expected[name], without[name]) for name in expected)

    def test_the_patch_need_not_divide_the_images(
        self, merged: SimoModel, experts: dict[str, SimoModel], odd_rooms: DenseDataset
    ) -> None:
        result = self.run(merged, experts, odd_rooms)
        images = torch.stack([odd_rooms.image(index) for index in range(2)])
        with torch.no_grad():
            for name, logits in result(images).items():
                assert logits.shape == (2, merged.tasks[name].channels, 21, 30) and torch.isfinite(logits).all()

    def test_the_seed_decides_everything(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        torch.rand(7)
        first = self.run(merged, experts, rooms)
        torch.manual_seed(3)
        assert same(weights(first), weights(self.run(merged, experts, rooms)))
        if self.trained:
            assert not same(weights(first), weights(self.run(merged, experts, rooms, seed=2)))

    @pytest.mark.parametrize("step", [3, SETTINGS.steps])
    def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
        self,
        merged: SimoModel,
        experts: dict[str, SimoModel],
        rooms: DenseDataset,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        step: int,
    ) -> None:
        expected, work = self.run(merged, experts, rooms), tmp_path / "work"

        def save_and_die(state: Any, log: Any) -> None:
            if log.steps == step:
                state.save(log)
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(TrainingState, "save_once_in_a_while", save_and_die)
            try:
                self.run(merged, experts, rooms, work_folder=work)
                assert not self.trained
            except Killed:
                states = [file for file in work.glob("*.safetensors") if "log" in open_checkpoint(file)]
                assert [steps_of(file) for file in states] == [step]
        resumed = self.run(merged, experts, rooms, work_folder=work)
        assert same(weights(expected), weights(resumed))
        costs = (model.provenance["realign"] for model in (expected, resumed))
        assert len({(cost["steps"], cost["trained_parameters"]) for cost in costs}) == 1

    # Errors ---------------------------------------------------------------------------------------------

    def test_a_model_without_heads_is_refused(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        self.refuses("no heads", SimoModel(merged.encoder, {}, {}), **self.inputs(experts, rooms))

    def test_missing_inputs_are_named(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        if self.method.teacher == "labels":
            name = self.method.name
            self.refuses(f"'{name}' learns from labels: give data=", merged, experts=experts, images=rooms)
            message = rf"'{name}' needs labels of every task.*segmentation\."
            self.refuses(message, merged, data=rooms.select(["depth"]))
            return
        if self.method.needs_base:
            self.refuses("give base=", merged, experts=experts, images=rooms)
        self.refuses("give images=", merged, experts=experts)
        for none in (None, {}):
            self.refuses("needs the experts", merged, experts=none, images=rooms)
        message = "no expert given for task 'segmentation'; the model has depth, segmentation"
        self.refuses(message, merged, experts={"depth": experts["depth"]}, images=rooms)
        many = {**experts, "edges": experts["depth"]}
        message = "expert 'edges': the model has no such task.*depth, segmentation"
        self.refuses(message, merged, experts=many, images=rooms)

    def test_wrong_names_and_values_are_named(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        inputs = self.inputs(experts, rooms)
        self.refuses(f"no re-alignment '{self.name}s': did you mean '{self.name}'", merged, f"{self.name}s", **inputs)
        self.refuses(rf"'{self.name}' has no parameter 'cuont': did you mean 'count'\?", merged, **inputs, cuont=4)
        self.refuses("count must be a number at least 1, got 0", merged, **inputs, count=0)

    def test_a_method_takes_parameters_as_its_name_does(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        made, inputs = get_realignment(self.name, **self.parameters), self.inputs(experts, rooms)
        expected = self.run(merged, experts, rooms, count=4)
        result = realign(merged, **inputs, method=made, count=4)
        records = [dict(model.provenance["realign"], seconds=0, after=None) for model in (expected, result)]
        assert records[0] == records[1] and same(weights(expected), weights(result)) and made.count is None
        message = rf"'{made.name}' has no parameter 'cuont': did you mean 'count'\?"
        with pytest.raises(InputError, match=message):
            realign(merged, **inputs, method=made, cuont=4)

    def test_adapters_in_the_model_stay_or_are_refused(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        for adapter in merged.encoder.add_adapters(2):
            nn.init.normal_(adapter.up.weight, std=0.2)
        if self.method.changes_encoder:
            self.refuses("has adapters already", merged, **self.inputs(experts, rooms))
            return
        result = self.run(merged, experts, rooms)
        assert result.encoder.adapters is not None and merged.encoder.adapters is not None
        assert same(weights(result.encoder.adapters), weights(merged.encoder.adapters))

    def test_count_uses_fewer_images(
        self, merged: SimoModel, experts: dict[str, SimoModel], rooms: DenseDataset
    ) -> None:
        record = self.run(merged, experts, rooms, count=4).provenance["realign"]
        assert record["labelled_images"] + record["unlabelled_images"] == 4

    # The other places that know it ----------------------------------------------------------------------

    def test_the_command_line_does_the_same(
        self, merged: SimoModel, experts: dict[str, SimoModel], tmp_path: Path
    ) -> None:
        for name, model in {"scene": merged, **experts}.items():
            model.save_pretrained(tmp_path / name)
        arguments = [str(tmp_path / "scene"), "--method", self.name, "--count", "4", *options_of(self.parameters)]
        if self.method.teacher == "labels":
            data: Any = load_data("rooms", split="val", count=4, tasks=list(merged.tasks))
            arguments += ["--data", "rooms", "--split", "val"]
        else:
            data = tmp_path / "photos"
            data.mkdir()
            for index, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (4, 24, 32, 3), np.uint8)):
                Image.fromarray(pixels).save(data / f"{index}.png")
            arguments += ["--images", str(data), *(f"{task}={tmp_path / task}" for task in experts)]
            arguments += ["--base", str(self.base_folder)] if self.method.needs_base else []
        arguments += ["--workers", "1"] if self.method.trains_heads_apart else []
        done = CliRunner().invoke(cli, ["realign", *arguments, "-o", str(tmp_path / "out"), "--json"])
        assert done.exit_code == 0, done.exception
        expected = self.run(merged, experts, data)
        found = SimoModel.from_pretrained(tmp_path / "out")
        assert same(weights(found), weights(expected))
        record, wanted = found.provenance["realign"], expected.provenance["realign"]
        assert json.loads(done.stdout)["realign"] == record
        assert {**record, "seconds": 0, "after": None} == {**wanted, "seconds": 0, "after": None}

    def test_the_command_line_explains_it(self) -> None:
        shown = CliRunner().invoke(cli, ["realign", "--help"]).output
        row = next(row for row in realignment_rows() if row["name"] == self.name)
        assert f"  {self.name:<17} {' '.join(row['summary'].split()[:3])}" in shown
        assert " ".join(row["summary"].split()) in " ".join(shown.split())
        for spec in settings(self.method):
            assert f"--{spec.name.replace('_', '-')}" in shown

    def test_the_schema_of_recipes_and_the_table_know_it(self) -> None:
        known = {spec.name for spec in settings(self.method)}
        expected = known | ({*TRAINING, "epochs"} - {"seed"} if self.trained else set())
        for key in ("realign", "refine"):
            schema = recipe_schema()["properties"][key]["properties"][self.name]
            assert set(schema["properties"]) == expected and schema["additionalProperties"] is False
        row = next(row for row in realignment_rows() if row["name"] == self.name)
        assert row["summary"] == summary(type(self.method)) or row["summary"].startswith("Short for ")
        assert row["paper"] and row["link"].startswith("https://")
        needed = "labelled images" if self.method.teacher == "labels" else "experts, unlabelled images"
        assert row["needs"] == needed + ", base" * self.method.needs_base

    def test_it_is_a_step_of_a_recipe(self) -> None:
        """tests/recipes/test_realignments.py runs it."""
        rest = {key: value for key, value in self.parameters.items() if key != "seed"}
        recipe = Recipe(realigned=(f"average+{self.name}",), merges=("average",), realign={self.name: rest})
        made = recipe.method(recipe.rows[0], seed=5)
        assert type(made) is type(self.method)
        if isinstance(made, TrainedRealignment):
            assert (made.training.seed, made.training.steps) == (5, SETTINGS.steps)
        for key, value in self.given.items():
            assert getattr(made, key) == value
