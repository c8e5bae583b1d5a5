"""Dynamic loss scale for fp16: doubles after a while without overflow, halves at an overflow."""

from llmtrain.config.train import LossScaleConfig


class LossScale:
    """The scale, moved by what the global gradient norm says, so that every rank moves it alike."""

    def __init__(self, cfg: LossScaleConfig):
        self.cfg = cfg
        self.value = cfg.init
        self.good_steps = 0

    def update(self, *, finite: bool) -> None:
        """Move the scale after a step whose gradients were finite or not. Raises FloatingPointError below the smallest scale."""
        if not finite:
            if self.value <= self.cfg.min:
                raise FloatingPointError(f"fp16 gradients overflow at the smallest loss scale {self.cfg.min} (precision.loss_scale.min)")
            self.value, self.good_steps = max(self.cfg.min, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps >= self.cfg.growth_every:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict:
        """JSON-able state."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load_state(self, state: dict) -> None:
        """Restore state()."""
        self.value, self.good_steps = float(state["value"]), int(state["good_steps"])
