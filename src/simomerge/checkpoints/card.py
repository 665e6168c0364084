"""The model card: the README.md of a model folder, made from the content of simo.json."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simomerge.core.assets import EMBEDDED_BASE
from simomerge.core.text import markdown, one_line

PICTURE = "picture.png"
"""The picture of a model folder that its card shows."""

_PIPELINES = {
    "segmentation": "image-segmentation",
    "binary": "image-segmentation",
    "depth": "depth-estimation",
    "disparity": "depth-estimation",
    "log_depth": "depth-estimation",
}
"""Kind of task -> the hub's name for it. A model of several tasks has the first of these that one of them has."""

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]+")
_LICENCE = re.compile(r"^license:[ \t]*['\"]?([\w.-]{1,40})['\"]?[ \t]*$", re.MULTILINE)


_MADE = "It was made with simomerge."
"""A sentence of every card."""
_LIBRARY = re.compile(r"^library_name: simomerge$", re.MULTILINE)


def model_card(description: Mapping[str, Any], picture: bool = False, name: str = "", licence: str = "") -> str:
    """The model card with the metadata that the hub understands.

    Args:
        description: The content of simo.json.
        picture: Whether `PICTURE` lies next to it.
        name: The hub id under which the model is published; by default, the card speaks of a folder.
        licence: The licence under which it is published; by default, the one that all parents have.
    """
    return f"""---
{_metadata(description, name, licence)}---
# {_title(description)}

{_summary(description)}
{f"{chr(10)}![An image and what the model predicts for it]({PICTURE}){chr(10)}" if picture else ""}
## Use

```python
import simomerge as sm

model = sm.load({json.dumps(name or "this/folder")})
maps = model.predict("photo.jpg")  # one array per task, at the photo's size
```

```shell
simomerge predict {name or "this/folder"} photo.jpg -o predictions
```

## Tasks

{_tasks(description)}

{_metrics(description)}
## Intended use and limits

{_limits(description)}

## Licence

{_licences(description, licence)}

## Where the weights come from

{_structure(description)}

```json
{_provenance(description)}
```
"""


def is_model_card(file: Path) -> bool:
    """Whether a README.md is a card that `model_card` made."""
    head, text = _head_and_text(file)
    return _LIBRARY.search(head) is not None and _MADE in text


def licence_of(folder: Path) -> str:
    """The licence that a folder's model card declares, as the hub names it; empty if there is none.

    Example:
        >>> _ = Path("README.md").write_text("---\\nlicense: apache-2.0\\n---\\n# A model")
        >>> licence_of(Path())
        'apache-2.0'
    """
    found = _LICENCE.search(_head_and_text(folder / "README.md")[0])
    return found[1] if found else ""


def _head_and_text(card: Path) -> tuple[str, str]:
    """The metadata between the first lines ``---`` of a card and what follows; empty where there are none."""
    if not card.is_file():
        return "", ""
    with card.open(encoding="utf-8", errors="replace") as file:
        start, _, rest = file.read(1 << 16).partition("---")
    head, _, text = rest.partition("\n---")
    return ("", "") if start.strip() else (head, text)


def _title(description: Mapping[str, Any]) -> str:
    count = len(description["tasks"])
    parts = "Shared and own blocks" if description["encoder"].get("tree") else "One encoder"
    return f"{parts}, {count} task{'s' if count != 1 else ''}"


def _summary(description: Mapping[str, Any]) -> str:
    tasks = ", ".join(map(markdown, description["tasks"])) or "no task"
    provenance = description["provenance"]
    experts, method = provenance.get("experts") or {}, provenance.get("merge", {}).get("method")
    text = f"It predicts {tasks} for every pixel of a photograph, in one pass."
    if method:
        count = f"{len(experts)} expert{'s' if len(experts) != 1 else ''}"
        text += f" Its encoder is the merge of {count} by {markdown(method)}"
        steps = [markdown(step) for step in realignments(provenance)]
        text += f", repaired afterwards by {', then '.join(steps)}." if steps else f". {_heads_of_an_edit(provenance)}"
    return f"{text} {_MADE}"


def _heads_of_an_edit(provenance: Mapping[str, Any]) -> str:
    """What a merge says of heads that no re-alignment repaired for its present encoder."""
    earlier = provenance.get("edited", {}).get("realigned")
    if not earlier:
        return "Its heads were not repaired."
    tasks, steps = (", ".join(map(markdown, earlier[key])) for key in ("tasks", "by"))
    return f"The heads of {tasks} were repaired for its encoder before a task was added or removed ({steps})."


def realignments(provenance: Mapping[str, Any]) -> list[str]:
    """The names of its re-alignments, the first one first."""
    found: list[str] = []
    record: Any = provenance.get("realign")
    while isinstance(record, Mapping):
        found.insert(0, str(record.get("method", "re-alignment")))
        record = record.get("after")
    return found


def _tasks(description: Mapping[str, Any]) -> str:
    heads = description["heads"]
    rows = []
    for name, task in description["tasks"].items():
        classes = task.get("classes") or ()
        shown = ", ".join(map(markdown, classes[:40])) + (", ..." if len(classes) > 40 else "")
        rows.append(f"| {name} | {markdown(task.get('kind', name))} | {markdown(heads[name]['kind'])} | {shown} |")
    return "\n".join(["| task | kind | head | classes |", "| --- | --- | --- | --- |", *rows])


def _metrics(description: Mapping[str, Any]) -> str:
    """The figures that were measured, with the experts' where they were measured too; nothing if there are none."""
    evaluation = description.get("evaluation")
    if not evaluation:
        return ""
    known = any(row.get("expert") is not None for row in evaluation["metrics"])
    head = ["task", "metric", "this model", *(["its expert"] if known else [])]
    rows = [head, [":--", ":--", *["--:"] * (len(head) - 2)]]
    for row in evaluation["metrics"]:
        arrow = "higher is better" if row["higher_is_better"] else "lower is better"
        unit = f" in {row['unit']}" if row["unit"] else ""
        cells = [row["task"], f"{row['metric']}{unit}, {arrow}", f"{row['value']:.4g}"]
        rows.append([*cells, *([_number(row.get("expert"))] if known else [])])
    table = "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in rows)
    delta = evaluation.get("delta_mtl")
    mean = "" if delta is None else f" On average it is {_change(delta)} its experts (Delta_MTL {delta:+.2f} %)."
    where = f"{evaluation['images']} images of {markdown(evaluation['data'])}, split {markdown(evaluation['split'])}"
    return f"## Measured\n\n{table}\n\nMeasured on {where}.{mean}\n"


def _cell(text: str) -> str:
    return text if re.fullmatch(r":?-+:?", text) else markdown(text)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def _change(delta: float) -> str:
    if abs(delta) < 0.05:
        return "as good as"
    return f"{abs(delta):.1f} % {'better' if delta > 0 else 'worse'} than"


def _limits(description: Mapping[str, Any]) -> str:
    data = description["provenance"].get("training", {}).get("data")
    lines = [
        "- It is meant for photographs like those that its experts were trained on"
        + (f" ({markdown(data)})" if data else "")
        + ". On others its predictions may be wrong without a sign of it: measure it on your own images first.",
        "- Predictions carry no measure of confidence. Do not let them decide alone where people can come to harm.",
        "- A merged model keeps the faults and biases of its base and its experts.",
    ]
    if learned_rooms(description["provenance"]):
        lines.append(
            "- It has seen rendered toy rooms only. It shows how simomerge works, and is of no use on photographs."
        )
    return "\n".join(lines)


def learned_rooms(provenance: Mapping[str, Any]) -> bool:
    """Whether a model learned from the built-in rooms: its training records their renderer.

    A model without a record of its training, such as a merge, comes from rooms if its base is the built-in one.

    Example:
        >>> learned_rooms({"training": {"data": "bedrooms"}}), learned_rooms({"base": {"source": "rooms-base"}})
        (False, True)
    """
    training = provenance.get("training")
    if training:
        return "renderer" in training
    return (provenance.get("base") or {}).get("source") == EMBEDDED_BASE


def _licences(description: Mapping[str, Any], licence: str) -> str:
    parents = dict(_parents(description))
    if not parents:
        return f"{markdown(licence)}." if licence else "Not stated. Choose one before you publish this model."
    lines = [f"- {markdown(name)}: {markdown(known) if known else 'not known'}" for name, known in parents.items()]
    own = licence or common_licence(description)
    first = (
        f"{markdown(own)}." if own else "Not stated. Choose one that all parents allow before you publish this model."
    )
    return "\n".join([first, "", "The licences of its parents:", "", *lines])


def _parents(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The base and the experts, each with its licence, which may be empty."""
    provenance = description["provenance"]
    for role, origin in (("the base", provenance.get("base") or {}), *(provenance.get("experts") or {}).items()):
        if origin:
            yield f"{role} ({origin.get('source', 'no name')})", str(origin.get("license", ""))


def common_licence(description: Mapping[str, Any]) -> str:
    """The licence of all parents, if they have the same; else empty."""
    found = {known for _, known in _parents(description)}
    return found.pop() if len(found) == 1 else ""


def _structure(description: Mapping[str, Any]) -> str:
    encoder = description["encoder"]
    tree = encoder.get("tree")
    if not tree:
        return "`encoder/` is a plain transformers folder, unless simo.json names a class for it."
    kept = f" Only what {', '.join(map(markdown, encoder['kept']))} need is here." if "kept" in encoder else ""
    levels = one_line(tree).replace("`", "'")
    start = f"Which tasks share which blocks, by the last block of each level: `{levels}`.{kept} `encoder/` is a plain"
    if "branch_rank" in encoder:
        return f"""{start}
transformers folder with the blocks and weights that all tasks share, and `branches/` has the differences of rank
{encoder["branch_rank"]} of the tasks' own blocks."""
    return f"""{start}
transformers folder with the blocks of the first task, `branches/` has the blocks that it does not share."""


def _provenance(description: Mapping[str, Any]) -> str:
    # Names in it must not end the block of code, or begin HTML.
    return json.dumps(description["provenance"], indent=2).replace("`", "\\u0060").replace("<", "\\u003c")


def _word(text: str) -> str:
    """A name from simo.json as the metadata hold it: short, and without signs that mean something elsewhere."""
    return re.sub(r"[^\w.% -]+", "-", text)[:80]


def _metadata(description: Mapping[str, Any], name: str, licence: str) -> str:
    """The card's YAML, which the hub reads."""
    from huggingface_hub.repocard_data import EvalResult, ModelCardData

    kinds = {name: str(task.get("kind", name)) for name, task in description["tasks"].items()}
    pipelines = [tag for kind, tag in _PIPELINES.items() if kind in kinds.values()]
    provenance = description["provenance"]
    origins = [provenance.get("base") or {}, *(provenance.get("experts") or {}).values()]
    sources = [str(origin.get("source", "")).partition("@")[0] for origin in origins]
    parents = list(dict.fromkeys(source for source in sources if _HUB_ID.fullmatch(source)))
    relation = "merge" if "merge" in provenance else "finetune"
    evaluation = description.get("evaluation") or {}
    tags = ["model-merging"] if "merge" in provenance else []
    data = ModelCardData(
        library_name="simomerge",
        pipeline_tag=pipelines[0] if pipelines else "image-to-image",
        license=_word(licence or common_licence(description)) or None,
        base_model=parents or None,
        base_model_relation=relation if parents else None,
        tags=[*tags, "dense-prediction", "multi-task", *map(_word, dict.fromkeys(kinds.values()))],
        model_name=name or "model" if evaluation else None,
        eval_results=[
            EvalResult(
                task_type=_PIPELINES.get(kinds.get(row["task"], ""), "image-to-image"),
                task_name=_word(row["task"]),
                dataset_type=_word(evaluation["data"]),
                dataset_name=_word(evaluation["data"]),
                dataset_split=_word(evaluation["split"]),
                metric_type=_word(row["metric"]),
                metric_name=f"{_word(row['metric'])} ({_word(row['unit'])})" if row["unit"] else _word(row["metric"]),
                metric_value=round(row["value"], 6),
            )
            for row in evaluation.get("metrics", ())
        ]
        or None,
    )
    return f"{data.to_yaml()}\n"
