"""Parameters that stay positive, such as scales and clip ratios: their logarithms are learned."""

import math

import torch

from spinlab import parallel

_BETAS = (0.8, 0.95)  # a run has tens of steps, so moments must forget fast


class LogParameters:
    """Hold positive tensors of any shape by name, and move their logarithms by Adam.

    lr: of a logarithm's step; most: an upper bound of the values. `logs` are leaves of autograd.
    """

    def __init__(self, lr: float, most: float | None = None) -> None:
        self.lr, self.most = lr, most
        self.logs: dict[str, torch.nn.Parameter] = {}
        self.optimizer: torch.optim.Adam | None = None

    def start(self, values: dict[str, torch.Tensor]) -> None:
        """Start from these values, of any shape."""
        self.logs = {name: torch.nn.Parameter(value.log()) for name, value in values.items()}
        self.optimizer = torch.optim.Adam(self.logs.values(), lr=self.lr, betas=_BETAS, eps=1e-30)

    def value(self, name: str) -> torch.Tensor:
        """Return a tensor as it stands, without a gradient."""
        return self.logs[name].detach().exp()

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move all at `rate` times the base rate, and forget the gradients that `logs` gathered.

        They are summed over processes; one that did not gather counts as 0.
        """
        if self.optimizer is None:
            return
        for log in self.logs.values():
            log.grad = parallel.sum_(torch.zeros_like(log) if log.grad is None else log.grad)
        self.optimizer.param_groups[0]["lr"] = self.lr * rate
        self.optimizer.step()
        for log in self.logs.values():
            log.grad = None
            if self.most is not None:
                log.clamp_(max=math.log(self.most))
        parallel.share_tensors([log.data for log in self.logs.values()])

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs: each logarithm and its moments, by name."""
        if self.optimizer is None:
            return {}
        found: dict[str, torch.Tensor] = {}
        for name, log in self.logs.items():
            found[f"log.{name}"] = log.detach()
            found |= {f"{key}.{name}": value for key, value in self.optimizer.state[log].items()}
        return found

    def load_state(self, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Continue from what `state` returned."""
        logs = {k.removeprefix("log."): v for k, v in tensors.items() if k.startswith("log.")}
        if not logs:
            return
        self.start({name: torch.empty_like(log, device=device) for name, log in logs.items()})
        assert self.optimizer is not None
        for name, log in logs.items():
            self.logs[name].data.copy_(log)
            keys = {key: f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[self.logs[name]] = {
                key: tensors[found].to("cpu" if key == "step" else device)
                for key, found in keys.items()
                if found in tensors
            }


def part_of(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
