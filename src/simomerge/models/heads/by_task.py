"""The heads of a model by the names of its tasks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


class TaskHeads(nn.ModuleDict):
    """An ``nn.ModuleDict`` whose keys may also be names of its attributes, such as a task called ``type``.

    torch refuses these keys, for a module is also an attribute. A head under such a key has a hyphen after it in the
    names of its tensors, as in ``type-.weight``; all others are named after their keys.

    Example:
        >>> heads = TaskHeads({"type": nn.Linear(2, 1, bias=False), "depth": nn.Linear(2, 1, bias=False)})
        >>> list(heads), list(heads.state_dict()), "type" in heads
        (['type', 'depth'], ['type-.weight', 'depth.weight'], True)
    """

    def __getitem__(self, task: str) -> nn.Module:
        return super().__getitem__(self._name(task))

    def __setitem__(self, task: str, head: nn.Module) -> None:
        super().__setitem__(self._name(task), head)

    def __delitem__(self, task: str) -> None:
        super().__delitem__(self._name(task))

    def __contains__(self, task: str) -> bool:
        return super().__contains__(self._name(task))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> Any:
        return dict(self.items()).keys()

    def items(self) -> Any:
        return {name.removesuffix("-"): head for name, head in self._modules.items()}.items()

    def _name(self, task: str) -> str:
        """The name of a head in torch. No task has a name with a hyphen."""
        return f"{task}-" if task not in self._modules and hasattr(self, task) else task
