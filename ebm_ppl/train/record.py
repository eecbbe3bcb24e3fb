"""What the steps of a training have told, on the host: as arrays while it runs, as a DataTree when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import xarray as xr


class Record(NamedTuple):
    """What the steps so far have told."""

    metrics: dict[str, np.ndarray]
    """Of each step, (step,)."""
    held_out: np.ndarray
    """Loss at points that are not trained on, (judgement,)."""

    @property
    def lengths(self) -> dict[str, int]:
        return {"steps": len(self.metrics["loss"]), "judgements": len(self.held_out)}

    @property
    def waited(self) -> int:
        """Judgements since the best."""
        return len(self.held_out) - 1 - int(np.argmin(self.held_out)) if len(self.held_out) else 0

    def with_steps(self, metrics: dict[str, np.ndarray]) -> Record:
        before = self.metrics or {name: x[:0] for name, x in metrics.items()}
        return self._replace(metrics={name: np.append(before[name], x) for name, x in metrics.items()})

    def with_judgement(self, loss: float) -> Record:
        return self._replace(held_out=np.append(self.held_out, loss))

    def as_datatree(self, every: int, attrs: dict[str, Any]) -> xr.DataTree:
        import xarray as xr

        num = len(self.metrics["loss"])
        steps = np.arange(1, num + 1)
        groups = {"training": xr.Dataset({k: ("step", x) for k, x in self.metrics.items()}, {"step": steps}, attrs)}
        if len(self.held_out):
            judged = np.minimum(np.arange(1, len(self.held_out) + 1) * every, num)
            groups["held_out"] = xr.Dataset({"loss": ("step", self.held_out)}, {"step": judged}, attrs)
        return xr.DataTree.from_dict(groups)
