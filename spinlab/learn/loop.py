"""The loop that learns R1 and R2 against the fake-quantized network.

Each step writes the rotated (and, if asked, quantized) weights into the stock network once, lets
ordinary backpropagation fill their gradients over all sequences of the batch, and pulls those
back to the rotations in closed form. The embedding and the head stay in their own basis: R1 turns
their output and input instead, which is the same function and touches no vocabulary-sized matrix.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import geoopt
import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab.config import LearnConfig, QuantConfig, TensorQuant, WeightsConfig
from spinlab.errors import InputError
from spinlab.learn.cayley import CayleySGD
from spinlab.learn.linear import LearnedLinear
from spinlab.learn.ranges import ClipRatios
from spinlab.learn.schedule import rate_at
from spinlab.model.seams import family_of, linears_of
from spinlab.rotation.orthogonal import orthogonality_error, polar
from spinlab.rotation.rotations import RotationSet
from spinlab.weights.rtn import search_ratios


class RotationLearner:
    """Hold the network, the rotations and the optimizer of one learning run.

    model: norms folded, R4 fused into its readers and running online, activations and the KV
    cache fake-quantized; its linear weights are overwritten from here on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rotations: RotationSet,
        learn: LearnConfig,
        quant: QuantConfig,
        weights: WeightsConfig,
    ) -> None:
        self.model, self.start = model, rotations
        self.learn, self.quant, self.weights = learn, quant, weights
        self.r1 = self._parameter("r1", rotations.r1)
        self.r2 = self._parameter("r2", rotations.r2)
        self.optimizer = self._optimizer()
        self.ratios = ClipRatios(learn.lr_clip) if learn.lr_clip else None
        self.linears = [
            LearnedLinear.take(name, layer, seam, module, self._format(name))
            for name, layer, seam, module in linears_of(model)
        ]
        if self.r1 is not None:
            self._turn_ends(self.r1)

    def _format(self, name: str) -> TensorQuant | None:
        """Return the format of a weight that is rounded in the loop."""
        format = self.quant.weights_at(name)
        return format if self.learn.quantize_weights and format.bits < 16 else None

    def _parameter(self, name: str, start: torch.Tensor | None) -> torch.Tensor | None:
        """Put a rotation on its manifold, or hold it fixed if it is not to be learned."""
        if start is None:
            return None
        start = start.to(self.model.device, torch.float32)
        if name not in self.learn.rotations:
            return start
        # geoopt makes its classes with __new__ and decorators that type checkers cannot follow
        manifold = cast(Any, geoopt.Stiefel)(canonical=False)
        return cast(Any, geoopt.ManifoldParameter)(start, manifold=manifold)

    def _optimizer(self) -> torch.optim.Optimizer:
        learn = self.learn
        rates = {"r1": learn.lr, "r2": learn.lr if learn.lr_r2 is None else learn.lr_r2}
        groups = [
            {"params": [getattr(self, name)], "lr": rate, "base_lr": rate, "name": name}
            for name, rate in rates.items()
            if isinstance(getattr(self, name), nn.Parameter)
        ]
        if learn.optimizer == "cayley_sgd":
            return CayleySGD(groups, learn.lr, learn.momentum, learn.cap_step)
        if learn.optimizer == "riemannian_sgd":
            riemannian_sgd = cast(Any, geoopt.optim.RiemannianSGD)
            return riemannian_sgd(groups, lr=learn.lr, momentum=learn.momentum)
        return geoopt.optim.RiemannianAdam(groups, lr=learn.lr)

    def _turn_ends(self, r1: torch.Tensor) -> None:
        """Enter the rotated basis after the embedding and leave it before the head."""
        family = family_of(self.model.config.model_type)
        embedding = self.model.get_submodule(family.embedding)
        head = self.model.get_submodule(family.head)

        def enter(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
            return out @ r1.to(out.dtype)

        def leave(module: nn.Module, args: tuple) -> tuple:
            return (args[0] @ r1.mT.to(args[0].dtype),)

        embedding.register_forward_hook(enter)
        head.register_forward_pre_hook(leave)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, index: int, batch: torch.Tensor) -> dict[str, float]:
        """Do one optimizer step on a batch of windows (batch, length) and return its curve."""
        self._write_weights(refresh=index % self.learn.clip_refresh == 0)
        loss = self._backward(batch)
        of_clips = self._collect_gradients()
        most = self.learn.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, float("inf") if most is None else most)
        if not (loss == loss and norm.isfinite()):
            raise InputError(
                f"learning diverged at step {index} (loss {loss}): lower learn.lr or learn.lr_r2, "
                "or set learn.max_grad_norm"
            )
        rate = rate_at(self.learn, index)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
        self.optimizer.step()
        if self.ratios is not None:
            self.ratios.step(of_clips, rate)
        if (index + 1) % self.learn.project_every == 0:
            self._project()
        return {
            "loss": loss,
            "lr": self.learn.lr * rate,
            "grad_norm": norm.item(),
            **self._health(),
        }

    @torch.no_grad()
    def _write_weights(self, refresh: bool) -> None:
        """Write every rotated weight into the network, rounded if weights are quantized here."""
        fresh: dict[str, torch.Tensor] = {}
        for linear in self.linears:
            weight = linear.rotate(self.r1, self.r2)
            if linear.format is not None:
                linear.clip = self._clip(linear, linear.format, weight, refresh)
                fresh[linear.name] = linear.clip
            linear.write(weight, keep=self.ratios is not None)
        if self.ratios is not None and not self.ratios.logs:
            self.ratios.start(fresh)

    def _clip(
        self, linear: LearnedLinear, format: TensorQuant, weight: torch.Tensor, refresh: bool
    ) -> torch.Tensor:
        """Return a weight's clip ratios: learned, or searched anew, or those of the last search."""
        if self.ratios is not None and self.ratios.logs:
            return self.ratios.ratio(linear.name)
        if refresh or linear.clip is None:
            return search_ratios(weight, format, self.weights)
        return linear.clip

    def _backward(self, batch: torch.Tensor) -> float:
        """Add up gradients over micro-batches; return the mean next-token cross-entropy."""
        parts = batch.to(self.model.device).split(self.learn.micro_batch)
        total = 0.0
        for part in parts:
            logits = self.model(input_ids=part, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            (loss / len(parts)).backward()
            total += loss.item() / len(parts)
        return total

    @torch.no_grad()
    def _collect_gradients(self) -> dict[str, torch.Tensor]:
        """Add the rotations' gradients through the weights to those through both ends.

        Returns the gradients of the clip ratios' logarithms, where ratios are learned.
        """
        of_clips: dict[str, torch.Tensor] = {}
        for linear in self.linears:
            found, of_clip = linear.gradients(self.r1, self.r2)
            if of_clip is not None:
                of_clips[linear.name] = of_clip
            for space, part in found:
                self._add_gradient(space, linear.layer, part)
        return of_clips

    def _add_gradient(self, space: str, layer: int, part: torch.Tensor) -> None:
        parameter = {"R1": self.r1, "R2": self.r2}[space]
        if not isinstance(parameter, nn.Parameter):
            return
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        (parameter.grad if space == "R1" else parameter.grad[layer]).add_(part)

    @torch.no_grad()
    def _project(self) -> None:
        for p in self.parameters:
            p.copy_(polar(p))

    def _health(self) -> dict[str, float]:
        """Return effective steps, the fraction of capped steps, and max|RRᵀ-I|."""
        out: dict[str, float] = {}
        for group in self.optimizer.param_groups:
            (p,) = group["params"]
            state = self.optimizer.state[p]
            if "alpha" in state:
                out[f"alpha/{group['name']}"] = state["alpha"].mean().item()
                out[f"capped/{group['name']}"] = state["capped"].float().mean().item()
            out[f"orthogonality/{group['name']}"] = orthogonality_error(p)
        self.optimizer.zero_grad()
        return out

    def result(self) -> RotationSet:
        """Return the learned rotations, projected in float64."""
        r1, r2 = (None if r is None else polar(r.detach()).cpu() for r in (self.r1, self.r2))
        return replace(self.start, r1=r1, r2=r2)

    def clips(self) -> dict[str, torch.Tensor]:
        """Return the learned clip ratios by linear; none if they were only searched."""
        if self.ratios is None:
            return {}
        return {name: self.ratios.ratio(name).cpu() for name in self.ratios.logs}

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything a resumed run needs to continue with the same bits."""
        tensors = {f"clip.{x.name}": x.clip for x in self.linears if x.clip is not None}
        if self.ratios is not None:
            tensors |= {f"ratios.{name}": value for name, value in self.ratios.state().items()}
        for group in self.optimizer.param_groups:
            (p,) = group["params"]
            tensors[f"rotation.{group['name']}"] = p.detach()
            for key, value in self.optimizer.state[p].items():
                kind = "tensor" if isinstance(value, torch.Tensor) else "number"
                tensors[f"optimizer.{group['name']}.{kind}.{key}"] = torch.as_tensor(value)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` returned."""
        device = self.model.device
        for linear in self.linears:
            linear.clip = tensors.get(f"clip.{linear.name}")
            linear.clip = None if linear.clip is None else linear.clip.to(device)
        if self.ratios is not None:
            mine = {k.removeprefix("ratios."): v for k, v in tensors.items() if k[:7] == "ratios."}
            self.ratios.load_state(mine, device)
        for group in self.optimizer.param_groups:
            (p,) = group["params"]
            p.copy_(tensors[f"rotation.{group['name']}"])
            for name, value in tensors.items():
                place, _, key = name.partition(f"optimizer.{group['name']}.")
                if not place and key:
                    kind, _, key = key.partition(".")
                    kept = value.to(device) if kind == "tensor" else value.item()
                    self.optimizer.state[p][key] = kept


def learn_rotations(
    learner: RotationLearner,
    windows: torch.Tensor,
    first: int,
    after_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Run the remaining steps; windows: (steps·batch, length), the same for every resume."""
    learn = learner.learn
    bar = tqdm(range(first, learn.steps), desc="learn", initial=first, total=learn.steps)
    for index in bar:
        batch = windows[index * learn.batch : (index + 1) * learn.batch]
        curve = learner.step(index, batch)
        bar.set_postfix(loss=f"{curve['loss']:.3f}")
        after_step(index, curve)
