"""What a model that was inserted into carries: the handle that takes a batch's media, and the reports."""

from __future__ import annotations

from dataclasses import dataclass

from .context import Context
from .integrators import Integrator


@dataclass(frozen=True)
class Place:
    """One layer of the report: the paths of its new children, or why it has none."""

    layer: str
    children: tuple[str, ...]
    reason: str = ""


class InsertReport:
    """What `insert` did, layer by layer."""

    def __init__(self, integrator: Integrator, family: str, places: list[Place], trained: int, frozen: int):
        self.integrator, self.family, self.places = integrator, family, places
        self.trained, self.frozen = trained, frozen

    @property
    def inserted(self) -> list[str]:
        return [child for p in self.places for child in p.children]

    def __bool__(self) -> bool:
        return bool(self.inserted)

    def __len__(self) -> int:
        return len(self.inserted)

    def __str__(self) -> str:
        kind = type(self.integrator).__name__
        lines = [
            f"vlkernels.insert: {kind} into {self.family}: {len(self)} modules of {self.trained} parameters; "
            f"{self.frozen} parameters of the base model frozen"
        ]
        lines += [f"  inserted {path}" for path in self.inserted]
        reasons: dict[str, list[str]] = {}
        for p in self.places:
            if p.reason:
                reasons.setdefault(p.reason, []).append(p.layer)
        lines += [f"  left     {', '.join(layers)}: {reason}" for reason, layers in reasons.items()]
        return "\n".join(lines)

    __repr__ = __str__


class Inserted(Context):
    """`model.vlkernels` after insert: hands a batch's media and masks to the inserted modules.

    What is set stays for all calls of the model until it is set anew or cleared; a batch of the model may be a multiple
    of the one that was set, as in beam search, where the beams of a sample stand beside each other.
    """

    def __init__(self):
        super().__init__()
        self.integrators: dict[str, Integrator] = {}
        self.reports: dict[str, InsertReport] = {}
        self.frozen: tuple[str, ...] = ()  # parameters that the first insert froze

    def __getstate__(self):
        return super().__getstate__() | {k: getattr(self, k) for k in ("integrators", "reports", "frozen")}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.integrators, self.reports, self.frozen = (state[k] for k in ("integrators", "reports", "frozen"))

    def set_media(self, media, locations=None, *, has_image=None, name: str | None = None) -> None:
        """Media of the next calls, for the integrator of that name, or for all that take media.

        media, by integrator. GatedCrossAttention, IdeficsCrossAttention: (B, J, n, C), with locations (B, T), True at
        each media token of the text or, in generation, of the prompt; a prefix of peft's before it does not count.
        AdaptivePrefix(visual=True): (B, 1 or rows, D). MemVP: features (B, N, C), has_image (B,) of 0 and 1.
        EpalmTokens: hidden states (layers, B, T, C).
        None: text alone. Locations on the CPU are checked against the media without waiting for a device.

        Raises: TypeError, ValueError, and what was set before stays.
        """
        given = {"media": media, "locations": locations, "has_image": has_image}
        self._set("media", {k: v for k, v in given.items() if k == "media" or v is not None}, name)

    def set_modality(self, mask, *, name: str | None = None) -> None:
        """VisualExpert's tokens of the next calls: mask (B, T) of 0 text and 1 image; None: all text."""
        self._set("modality", {"modality": mask}, name)

    def set_task(self, task: str | None, *, name: str | None = None) -> None:
        """Which task's adapters the next calls go through; None: the first."""
        self._set("task", {"task": task}, name)

    def _set(self, kind: str, values: dict, name: str | None) -> None:
        if name is not None and name not in self.integrators:
            raise ValueError(f"nothing is inserted as {name!r}; accepted: {', '.join(self.integrators)}")
        found = {n: i for n, i in self.integrators.items() if kind in i.takes and name in (None, n)}
        unused = [k for k in values if not any(k in i.takes for i in found.values())]
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: taken by none of {', '.join(self.integrators)}"
                if name is None
                else f"{', '.join(unused)}: {name} takes {', '.join(self.integrators[name].takes) or 'nothing'}"
            )
        batches = {n: i.batch(self, **{k: v for k, v in values.items() if k in i.takes}) for n, i in found.items()}
        for n, batch in batches.items():
            self.set(n, batch)

    def clear(self) -> None:
        """Forget what was set."""
        for name in self.integrators:
            self.set(name, None)

    def __repr__(self) -> str:
        return "\n".join(str(r) for r in self.reports.values()) or "vlkernels: nothing inserted"
