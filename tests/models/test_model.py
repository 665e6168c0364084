"""SimoModel: predictions at the image's size, folders bit for bit, and folders that are damaged."""

import copy
import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, Dinov2Model

from simomerge.checkpoints.description import RANK_FORMAT, model_card
from simomerge.core.errors import InputError
from simomerge.datasets.tasks import Task
from simomerge.merging.disk.merge import merge_on_disk
from simomerge.models.heads import TaskHeads
from simomerge.models.heads.linear import LinearHead
from simomerge.models.model import SimoModel, load

SEG = Task("seg", "segmentation", classes=("floor", "wall", "sofa"), colours=((1, 2, 3), (4, 5, 6), (7, 8, 9)))
TASKS = {"seg": SEG, "depth": Task("depth"), "normals": Task("normals")}
IMAGES = torch.rand(2, 3, 21, 30, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(make_model):
    return make_model(TASKS)


@pytest.fixture
def adapted(make_model):
    """A model with DPT heads, adapters with an effect, and no setting at its default."""
    model = make_model(TASKS, head="dpt", seed=1)
    model.encoder.set_taps((4, 1, 2, 3))
    model.encoder.apply_layernorm = False
    generator = torch.Generator().manual_seed(2)
    for adapter in model.encoder.add_adapters(rank=2, activation="relu"):
        torch.nn.init.normal_(adapter.up.weight, generator=generator)
    model.provenance = {"method": "ties", "scale": 0.3, "experts": {"seg": {"fingerprint": "0f" * 32}}}
    return model


@pytest.fixture(scope="module")
def saved(make_model, tmp_path_factory):
    return make_model(TASKS).save_pretrained(tmp_path_factory.mktemp("saved") / "scene")


@pytest.fixture
def folder(saved, tmp_path):
    """The folder of ``model``, to damage at will."""
    return shutil.copytree(saved, tmp_path / "scene")


@torch.no_grad()
def logits(model):
    return model(IMAGES)


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def edit(folder, change):
    """Apply ``change`` to the content of simo.json."""
    path = folder / "simo.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(change(description) or description))


# Predicting ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 32), (21, 30), (5, 41)])
def test_predict_gives_maps_of_the_images_size_the_same_for_every_form(model, tmp_path, size):
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(picture).save(path)
    first = model.predict(path)
    assert {name: (m.shape, m.dtype.name) for name, m in first.items()} == {
        "seg": (size, "int64"),
        "depth": (size, "float32"),
        "normals": ((3, *size), "float32"),
    }
    forms = [Image.fromarray(picture), picture, torch.from_numpy(picture).permute(2, 0, 1), str(path)]
    for form in forms:
        again = model.predict(form)
        assert all(np.array_equal(first[name], again[name]) for name in TASKS)


def test_predict_is_activated_forward(model):
    image = IMAGES[:1]
    raw, maps = logits(model), model.predict(image)
    assert np.array_equal(maps["seg"], raw["seg"][0].argmax(0).numpy())
    np.testing.assert_allclose(maps["depth"], raw["depth"][0, 0].clamp(min=1e-3).numpy(), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(maps["normals"], axis=0), 1, atol=1e-5)


def test_logits_are_cropped_from_the_padded_size(model):
    with torch.no_grad():
        features = model.encode(IMAGES)
        padded = model.heads["depth"](features)
    assert padded.shape == (2, 1, 24, 32)
    assert torch.equal(logits(model)["depth"], padded[..., :21, :30])


def test_decode_runs_only_the_heads_asked_for(model):
    with torch.no_grad():
        some = model.decode(model.encode(IMAGES), ["normals", "seg"])
    assert list(some) == ["normals", "seg"]
    assert torch.equal(some["seg"], logits(model)["seg"])


@pytest.mark.parametrize("call", ["forward", "encode", "decode", "predict_batch"])
def test_every_call_takes_tasks_as_text_and_suggests_the_nearest_name(model, call):
    with torch.no_grad():
        given = model.encode(IMAGES) if call == "decode" else IMAGES
        run = getattr(model, call)
        if call != "encode":
            assert list(run(given, tasks="depth")) == ["depth"]
            assert list(run(given, tasks="normals,seg")) == list(run(given, tasks=iter(["normals", "seg"])))
            assert list(run(given, tasks="all")) == list(TASKS)
        with pytest.raises(InputError, match="unknown task 'dpth'; did you mean 'depth'"):
            run(given, tasks=["dpth"])


def test_every_image_of_a_list_gets_the_tasks_of_an_iterator(model):
    found = model.predict([IMAGES[:1], IMAGES[1:]], tasks=iter(["seg", "depth"]))
    assert [list(each) for each in found] == [["seg", "depth"]] * 2


@pytest.mark.parametrize("tasks", [None, "depth", ["normals", "seg"]])
def test_a_compiled_model_takes_tasks_too(model, tasks):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES, tasks=tasks), model(IMAGES, tasks=tasks))  # another attention


def test_predict_uses_running_statistics_and_gives_the_mode_back(model):
    before = model.predict(IMAGES[:1])
    model.train()
    after = model.predict(IMAGES[:1])
    assert model.training and model.heads["seg"].norm.training
    assert all(np.array_equal(before[name], after[name]) for name in TASKS)


def test_predict_gives_every_submodule_its_own_mode_back(model):
    model.train()
    model.encoder.eval()
    model.heads["depth"].eval()
    before = [module.training for module in model.modules()]
    model.predict(IMAGES[:1])
    assert before == [module.training for module in model.modules()] and len(set(before)) == 2


def test_predict_gives_the_mode_back_after_an_error(model):
    model.train()
    model.heads["seg"].forward = lambda features: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model.predict(IMAGES[:1])
    assert model.training


def test_the_encoder_gets_an_image_at_the_size_asked_for(model):
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[-2:])))
    sizes = {"own": (21, 30), "12x20": (12, 20), (12, 20): (12, 20), None: (6, 9)}
    for size, expected in sizes.items():
        found = model.predict(IMAGES[:1], max_patches=1, size=size)
        assert seen.pop() == expected and found["depth"].shape == (21, 30)


@pytest.mark.parametrize("size", [16, "16", (16,), (0, 4), "small"])
def test_a_wrong_size_or_number_of_patches_is_refused(model, size):
    with pytest.raises(InputError, match="give HEIGHTxWIDTH in pixels, such as 480x640"):
        model.predict(IMAGES[:1], size=size)
    for patches in (0, -1, float("nan")):
        with pytest.raises(InputError, match=f"max_patches is {patches}; give 1 or more"):
            model.predict(IMAGES[:1], max_patches=patches)


def test_predict_refuses_what_is_no_image(model, tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: no such image file"):
        model.predict(tmp_path / "gone.png")
    with pytest.raises(InputError, match="image values from"):
        model.predict(255 * IMAGES[0])


# Building -----------------------------------------------------------------------------------------------


def test_tasks_and_heads_must_have_the_same_names(model):
    heads = {"seg": model.heads["seg"]}
    with pytest.raises(InputError, match=r"\['depth', 'seg'\] and heads \['seg'\] must have the same names"):
        SimoModel(model.encoder, {"seg": SEG, "depth": TASKS["depth"]}, heads)
    with pytest.raises(InputError, match="must have the same names"):
        SimoModel(model.encoder, {}, heads)


def test_select_shares_the_encoder_and_heads_in_the_order_asked(model):
    model.source, model.provenance = "somewhere", {"method": "ties"}
    some = model.select("normals,seg")
    assert list(some.tasks) == list(some.heads) == ["normals", "seg"]
    assert some.encoder is model.encoder and some.heads["seg"] is model.heads["seg"]
    assert (some.source, some.provenance) == ("somewhere", {"method": "ties"})
    with pytest.raises(InputError, match="did you mean 'depth'"):
        model.select("dept")


def test_a_deep_copy_is_independent(adapted):
    before = logits(adapted)
    twin = copy.deepcopy(adapted)
    assert_same(logits(twin), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same(logits(adapted), before)


def test_the_encoder_fingerprint_sees_the_encoder_only(make_model):
    one, other = make_model(TASKS, seed=0), make_model(TASKS, seed=5)
    assert not torch.equal(one.heads["seg"].output.weight, other.heads["seg"].output.weight)
    assert one.encoder_fingerprint() == other.encoder_fingerprint()
    with torch.no_grad():
        other.encoder.backbone.layernorm.bias[0] += 1e-3
    assert one.encoder_fingerprint() != other.encoder_fingerprint()


# Names of tasks -----------------------------------------------------------------------------------------


def test_tasks_may_have_the_names_of_attributes_of_modules(make_model, tmp_path):
    named = {name: Task(name, "depth") for name in ("type", "half", "items", "values", "update", "training", "far")}
    model = make_model(named)
    assert list(model.heads) == list(model.heads.keys()) == list(named)
    assert {name.split(".")[0] for name in model.heads.state_dict()} == {*(f"{n}-" for n in [*named][:-1]), "far"}
    assert model.heads["type"] is dict(model.heads.items())["type"] and "far-" not in model.heads
    again = load(copy.deepcopy(model).save_pretrained(tmp_path / "scene"))
    assert_same(logits(model), logits(again))
    assert list(again.predict(IMAGES[:1])) == list(named)
    assert list(again.select(["far", "type"]).heads) == ["far", "type"]
    replaced = LinearHead(model.encoder.channels, 1)
    again.heads["type"] = replaced
    assert again.heads["type"] is replaced and len(again.heads) == len(named)
    assert again.heads.pop("half") is not None and "half" not in again.heads and "type" in again.heads


def test_every_name_of_an_attribute_can_be_that_of_a_head():
    names = [name for name in dir(torch.nn.ModuleDict()) if name.isidentifier()]
    heads = TaskHeads({name: torch.nn.Linear(1, 1) for name in names})
    assert list(heads) == names and len(heads.state_dict()) == 2 * len(names)
    heads.to(torch.float64).eval().load_state_dict(copy.deepcopy(heads).state_dict())
    assert all(heads[name].weight.dtype == torch.float64 and not heads[name].training for name in names)


@pytest.mark.filterwarnings("ignore:expert .* does not record its base", "ignore:The task vector of")
def test_a_merge_on_disk_with_such_a_name_can_be_loaded(make_model, tiny_base, tmp_path):
    models = {name: make_model({name: Task(name, "depth")}) for name in ("type", "far")}
    experts = {name: model.save_pretrained(tmp_path / name) for name, model in models.items()}
    merge_on_disk(tiny_base, experts, tmp_path / "scene", "average")
    assert list(load(tmp_path / "scene").predict(IMAGES[:1])) == ["type", "far"]


# Saving and reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["model", "adapted"])
def test_a_saved_model_comes_back_bit_for_bit(fixture, request, tmp_path):
    model = request.getfixturevalue(fixture)
    again = SimoModel.from_pretrained(model.save_pretrained(tmp_path / "scene"))
    assert_same(model.state_dict(), again.state_dict())
    assert_same(logits(model), logits(again))
    assert again.tasks == model.tasks and list(again.tasks) == list(model.tasks)
    assert again.provenance == model.provenance and not again.training
    assert again.encoder.preprocessing == model.encoder.preprocessing
    assert (again.encoder.adapters is None) == (model.encoder.adapters is None)


def test_normalisation_of_many_digits_survives(model, tmp_path):
    model.encoder.mean.fill_(0.48145466)
    model.encoder.std.fill_(1 / 3)
    again = SimoModel.from_pretrained(model.save_pretrained(tmp_path / "scene"))
    assert_same(logits(model), logits(again))


def test_saving_twice_gives_the_same_bytes(adapted, tmp_path):
    folders = [adapted.save_pretrained(tmp_path / name) for name in ("one", "two")]
    files = [{str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders]
    assert files[0] == files[1]
    assert set(files[0]) >= {"simo.json", "README.md", "adapters.safetensors", "heads/seg.safetensors"}


def test_the_encoder_folder_is_a_plain_transformers_model(model, folder):
    for cls in (AutoModel, Dinov2Model):
        plain = cls.from_pretrained(folder / "encoder").eval()
        with torch.no_grad():
            images = torch.nn.functional.interpolate(IMAGES, (24, 32))
            last = plain((images - model.encoder.mean) / model.encoder.std).last_hidden_state
            features = model.encode(images)
        torch.testing.assert_close(features.cls[-1], last[:, 0], rtol=0, atol=1e-5)
        torch.testing.assert_close(features.maps[-1].flatten(2).transpose(1, 2), last[:, 1:], rtol=0, atol=1e-5)


def test_load_takes_a_model_folder_or_a_bare_encoder(folder, tiny_base):
    assert list(load(folder).tasks) == list(TASKS) and load(folder).source == str(folder)
    bare = load(tiny_base)
    assert bare.tasks == {} and bare.predict(IMAGES[:1]) == {}
    assert bare.encoder.preprocessing == load(folder).encoder.preprocessing


def test_the_model_card_lists_the_tasks_and_where_the_weights_come_from(adapted, tmp_path):
    card = (adapted.save_pretrained(tmp_path / "scene") / "README.md").read_text()
    assert "| seg | segmentation | dpt |" in card
    assert "| depth | depth | dpt |" in card
    assert "# One encoder, 3 tasks" in card and '"method": "ties"' in card
    assert "# One encoder, 1 task\n" in model_card(adapted.select("depth").description())


# An existing folder, a crash, a full disk ---------------------------------------------------------------


def test_an_existing_folder_is_not_overwritten_unasked(make_model, folder):
    before = (folder / "heads" / "seg.safetensors").read_bytes()
    with pytest.raises(InputError, match=f"{folder} already exists"):
        make_model(TASKS, seed=9).save_pretrained(folder)
    assert (folder / "heads" / "seg.safetensors").read_bytes() == before


def test_overwrite_replaces_the_whole_folder(make_model, folder):
    other = make_model([TASKS["depth"]], seed=9)
    other.save_pretrained(folder, overwrite=True)
    assert [p.name for p in (folder / "heads").iterdir()] == ["depth.safetensors"]
    assert_same(logits(SimoModel.from_pretrained(folder)), logits(other))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def break_at(monkeypatch, error, fatal_call):
    """Make the writing of the n-th safetensors file of a head fail in the middle."""
    calls = []

    def failing(tensors, path):
        calls.append(path)
        if len(calls) == fatal_call:
            path.write_bytes(b"half")
            raise error
        save_file(tensors, path)

    monkeypatch.setattr("safetensors.torch.save_file", failing)


@pytest.mark.parametrize("fatal_call", [1, 3])
@pytest.mark.parametrize("error", [RuntimeError("crash"), KeyboardInterrupt()])
def test_a_crash_while_saving_leaves_nothing(model, tmp_path, monkeypatch, error, fatal_call):
    break_at(monkeypatch, error, fatal_call)
    with pytest.raises(type(error)):
        model.save_pretrained(tmp_path / "scene")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_while_overwriting_leaves_the_old_model(make_model, model, folder, monkeypatch):
    break_at(monkeypatch, RuntimeError("crash"), 2)
    with pytest.raises(RuntimeError, match="crash"):
        make_model(TASKS, seed=9).save_pretrained(folder, overwrite=True)
    assert_same(logits(SimoModel.from_pretrained(folder)), logits(model))
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(model, tmp_path, monkeypatch):
    break_at(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 2)
    with pytest.raises(InputError, match=r"scene: no space left; free some space"):
        model.save_pretrained(tmp_path / "scene")
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_is_not_registered_is_refused_before_anything_is_left(model, tmp_path):
    class Mine(LinearHead):
        pass

    model.heads["depth"] = Mine([32] * 4, 1)
    with pytest.raises(InputError, match="Mine is defined inside a function"):
        model.save_pretrained(tmp_path / "scene")
    assert list(tmp_path.iterdir()) == []


# Damaged folders ----------------------------------------------------------------------------------------


def test_a_folder_without_simo_json_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: not a model folder"):
        SimoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", '"text"', "null", '{"format": 1}', "\x00"])
def test_a_damaged_simo_json_is_named(folder, content):
    (folder / "simo.json").write_text(content)
    with pytest.raises(InputError, match=r"simo\.json"):
        SimoModel.from_pretrained(folder)


@pytest.mark.parametrize("entry", ["format", "tasks", "heads", "encoder", "adapters", "provenance"])
def test_a_missing_entry_is_named(folder, entry):
    edit(folder, lambda d: d.pop(entry) and None)
    with pytest.raises(InputError, match=rf"simo\.json: .*entry '{entry}' is missing"):
        SimoModel.from_pretrained(folder)


BROKEN = {
    "no taps": lambda d: d["encoder"].pop("taps") and None,
    "no mean": lambda d: d["encoder"].pop("mean") and None,
    "a mean of two numbers": lambda d: d["encoder"].update(mean=[0.5, 0.5]),
    "a tap too deep": lambda d: d["encoder"].update(taps=[1, 2, 3, 9]),
    "taps that are text": lambda d: d["encoder"].update(taps="1234"),
    "an encoder that is no mapping": lambda d: d.update(encoder=[]),
    "tasks that are a list": lambda d: d.update(tasks=["seg"]),
    "a task of unknown kind": lambda d: d["tasks"]["depth"].update(kind="dpth"),
    "a task with an unknown key": lambda d: d["tasks"]["depth"].update(colour=1),
    "a head of unknown kind": lambda d: d["heads"]["depth"].update(kind="unet"),
    "a head without a kind": lambda d: d["heads"]["depth"].pop("kind") and None,
    "a head with an unknown setting": lambda d: d["heads"]["depth"]["settings"].update(width=3),
    "a task without a head": lambda d: d["heads"].pop("depth") and None,
    "adapters of unknown settings": lambda d: d.update(adapters={"width": 3}),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_an_entry_that_makes_no_model_names_the_file(folder, change):
    edit(folder, change)
    with pytest.raises(InputError, match=r"scene/(simo\.json|adapters\.safetensors)"):
        SimoModel.from_pretrained(folder)


@pytest.mark.parametrize("number", [RANK_FORMAT + 1, 99])
def test_a_newer_format_asks_for_an_upgrade(folder, number):
    edit(folder, lambda d: d.update(format=number))
    with pytest.raises(InputError, match=rf"simo\.json: format {number} is newer .*upgrade"):
        SimoModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["heads/depth.safetensors", "adapters.safetensors"])
def test_a_missing_truncated_or_foreign_file_is_named(adapted, tmp_path, name):
    folder = adapted.save_pretrained(tmp_path / "scene")
    path = folder / name
    content = path.read_bytes()
    for keep in (0, 7, 60, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(InputError, match=f"{path} is not a complete safetensors file"):
            SimoModel.from_pretrained(folder)
    tensors = load_file(folder / "heads" / "seg.safetensors")
    save_file(tensors, path)
    with pytest.raises(InputError, match=f"{path}: does not fit simo.json"):
        SimoModel.from_pretrained(folder)
    path.unlink()
    with pytest.raises(InputError, match=f"{path}: missing"):
        SimoModel.from_pretrained(folder)


def test_a_head_without_one_of_its_tensors_is_named(folder):
    path = folder / "heads" / "depth.safetensors"
    tensors = load_file(path)
    del tensors["output.bias"]
    save_file(tensors, path)
    with pytest.raises(InputError, match=rf"{path}: does not fit.*output\.bias"):
        SimoModel.from_pretrained(folder)


def test_a_truncated_encoder_is_named(folder):
    path = folder / "encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=f"{path} is not a complete safetensors file"):
        SimoModel.from_pretrained(folder)


def test_a_missing_encoder_is_never_looked_for_on_the_hub(folder, monkeypatch):
    (folder / "encoder").rename(folder / "elsewhere")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("simomerge.models.model.load_backbone", lambda source: pytest.fail(f"asked for {source}"))
    with pytest.raises(InputError, match="scene/encoder: missing"):
        SimoModel.from_pretrained("scene")  # "scene/encoder" has the form of a hub id
