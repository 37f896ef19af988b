"""The loop that learns rotations against the fake-quantized network, and its progress on disk."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from spinlab import parallel
from spinlab.config import ClipSearch, LearnConfig, QuantConfig
from spinlab.device import float32_products_for
from spinlab.learn.divergence import DivergenceCheck
from spinlab.learn.learned import LearnedRotations
from spinlab.learn.optim import make_optimizer, rate_at
from spinlab.learn.shards import is_sharded
from spinlab.learn.spaces import (
    ActivationSpace,
    LearningSpace,
    LocalTerms,
    Parts,
    space_of,
)
from spinlab.learn.spaces.owners import LearnedLinears
from spinlab.learn.teacher import layer_errors, layer_states, unquantized
from spinlab.model.load import cast_model
from spinlab.model.modules import decoder_of, head_of, map_of, read_by_head
from spinlab.rotation.orthogonal import orthogonality_error
from spinlab.rotation.rotations import RotationSet
from spinlab.tensors import kept_tensors, save_tensors

log = logging.getLogger(__name__)


class RotationLearner:
    """Hold the network, the rotations and the optimizer of one learning run.

    model: norms folded, R4 fused into its readers and running online, activations and the KV
    cache fake-quantized; it is overwritten. teacher: the original, for terms that compare with it;
    without quantized weights the network itself, unquantized, serves instead. One that is spread
    over processes (`spinlab.learn.shards`) has learn.dtype already, and `linears` are those of it
    that are rounded. space: another way to compute the same, for comparison.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        start: RotationSet,
        learn: LearnConfig,
        quant: QuantConfig,
        clip: ClipSearch,
        teacher: PreTrainedModel | None = None,
        space: type[LearningSpace] | None = None,
        linears: LearnedLinears | None = None,
    ) -> None:
        self.model, self.start, self.learn, self.teacher = model, start, learn, teacher
        self.quant = quant
        dtype = getattr(torch, learn.dtype) if learn.dtype else model.dtype
        inputs = map_of(model).input_at
        self.rotations = LearnedRotations(start, learn, inputs, model.device, dtype)
        self.local = LocalTerms(learn.objective, self.rotations)
        space = space or space_of(learn, quant)
        ranges = start.weight_clips
        parts = Parts(model, self.rotations, self.local, learn, quant, clip, ranges, linears)
        self.space = space(parts)
        for network in (model, teacher):  # what a space has kept stays as it was
            if network is not None and not is_sharded(network):
                cast_model(network, dtype)
        groups = [
            {"params": [parameter], "lr": rate, "base_lr": rate, "name": name}
            for name, parameter in self.rotations.parameters.items()
            for rate in [learn.lr.of_rotation(name)]
        ]
        self.optimizer = make_optimizer(groups, learn) if groups else None
        self.divergence = DivergenceCheck(learn.max_loss_ratio)
        self.head = head_of(model).weight

    def step(self, index: int, batch: torch.Tensor) -> dict[str, float]:
        """Do one step on a batch of windows (batch, length) and return its curve.

        It has the loss with its terms; of rotations their rate, gradients' norm and health.
        """
        terms, norm = self.gradients(index, batch)
        self.divergence.check(index, terms["loss"], norm, self.numbers())
        rate = rate_at(self.learn, index)
        for group in self._groups:
            group["lr"] = group["base_lr"] * rate
        if self.optimizer is not None:
            self.optimizer.step()
        self.space.step(rate)
        self.rotations.step_scales(rate)
        if (index + 1) % self.learn.optimizer.project_every == 0:
            self.rotations.project()
        self.rotations.agree()
        if self.optimizer is None:
            return terms
        rates = (group["lr"] for group in self._groups if group["base_lr"])
        return {**terms, "lr": next(rates, 0.0), "grad_norm": norm, **self._health()}

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: none where ranges alone are learned."""
        return [] if self.optimizer is None else self.optimizer.param_groups

    def _states(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield the optimizer's groups, each with the state of its one rotation."""
        for group in self._groups:
            (p,) = group["params"]
            assert self.optimizer is not None
            yield group, self.optimizer.state[p]

    def gradients(self, index: int, batch: torch.Tensor) -> tuple[dict[str, float], float]:
        """Gather the gradients of a step on a batch of windows (batch, length), clipped.

        Return the loss with its terms, and the norm of the rotations' gradients before the clip.
        """
        self.rotations.begin()
        with self._products():
            self.space.begin(index)
        terms = self._backward(batch)
        with self._products():
            self.space.collect()
        return terms, self.rotations.finish(self.learn.optimizer.max_grad_norm).item()

    def _products(self) -> AbstractContextManager[None]:
        """Return a context for products of rotations and weights, and of their gradients."""
        return float32_products_for(self.model.dtype, self.model.device)

    def _backward(self, batch: torch.Tensor) -> dict[str, float]:
        """Add up gradients over micro-batches; return the mean loss and its terms."""
        mine = parallel.part(batch).to(self.model.device)
        totals: dict[str, torch.Tensor] = {}
        self.local.totals = totals
        parts = mine.split(self.learn.micro_batch)
        for part in parts:
            share = len(part) / len(batch)
            for name, term in self._passes(part, share).items():
                totals[name] = totals.get(name, 0) + term.detach() * share
            if len(parts) > 1:
                self.space.after_backward()
        weights = self.learn.objective.weights
        loss = sum(weights[name] * total for name, total in totals.items())
        found = {"loss": loss, **totals} if len(totals) > 1 else {"loss": loss}
        names = sorted(found)
        values = parallel.sum_(torch.stack([torch.as_tensor(found[n]).double() for n in names]))
        return dict(zip(names, values.tolist(), strict=True))

    def _passes(self, ids: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
        """Run the passes over one micro-batch, with `share` of the batch, that the terms need."""
        objective, terms = self.learn.objective, {}
        if objective.layer_mse:
            with self._as_teacher() as teacher:
                states = layer_states(teacher, ids)
            terms["layer_mse"] = layer_errors(self.model, self.space, ids, states)
            (objective.layer_mse * share * terms["layer_mse"]).backward()
        if objective.on_logits:
            terms |= self._logit_terms(ids, share)
        elif objective.on_activations:
            self.local.share = share
            with torch.no_grad(), nullcontext() if objective.end_to_end else self._quiet():
                decoder_of(self.model)(input_ids=ids, use_cache=False)
            self.local.share = 0
        return terms

    def _logit_terms(self, ids: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
        objective, known = self.learn.objective, None
        if objective.kl:
            with self._as_teacher() as teacher, torch.no_grad():
                known = read_by_head(teacher, ids), head_of(teacher).weight
        self.local.share = share
        hidden = read_by_head(self.model, ids)
        self.local.share = 0
        loss, terms = self.space.head_loss(hidden, self.head, ids, objective, known)
        (loss * share).backward()
        return terms

    def _as_teacher(self):
        """Return a context that gives the original model: apart, or this one without quantizers."""
        if self.teacher is not None:
            return nullcontext(self.teacher)
        assert isinstance(self.space, ActivationSpace), (
            "rounded weights need a teacher of their own"
        )
        return self._quiet()

    @contextmanager
    def _quiet(self) -> Iterator[PreTrainedModel]:
        with unquantized(self.model):
            yield self.model

    def _health(self) -> dict[str, float]:
        """Return effective steps, the fraction of capped steps, and max|RRᵀ-I|."""
        out: dict[str, float] = {}
        for group, state in self._states():
            (p,) = group["params"]
            if "alpha" in state:
                out[f"alpha/{group['name']}"] = state["alpha"].mean().item()
                out[f"capped/{group['name']}"] = state["capped"].float().mean().item()
            out[f"orthogonality/{group['name']}"] = orthogonality_error(p)
        return out

    def numbers(self) -> dict[str, torch.Tensor]:
        """Return everything learned that `result` holds, as it stands."""
        return self.rotations.numbers() | self.space.numbers()

    @torch.no_grad()
    def restore(self, numbers: Mapping[str, torch.Tensor]) -> None:
        """Set what `numbers` returned back to where it was."""
        for name, tensor in self.numbers().items():
            tensor.copy_(numbers[name])

    def result(self) -> RotationSet:
        """Return the learned rotations, projected in float64, and the ranges learned with them.

        Weight ranges that the start brought and that were not learned on belong to its rotations.
        """
        ranges = {
            "clips": {**self.start.clips, **self.space.input_clips()},
            "kv_clips": {**self.start.kv_clips, **self.space.kv_clips()},
            "weight_clips": self.space.clips(),
        }
        return replace(self.start, **self.rotations.result(), **ranges)

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything a resumed run needs to continue with the same bits."""
        tensors = self.rotations.state() | self.space.state() | self.divergence.state()
        for group, state in self._states():
            for key, value in state.items():
                kind = "tensor" if isinstance(value, torch.Tensor) else "number"
                tensors[f"optimizer.{group['name']}.{kind}.{key}"] = torch.as_tensor(value)
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from what `state` returned."""
        device = self.model.device
        self.rotations.load_state(tensors, device)
        self.space.load_state(tensors, device)
        self.divergence.load_state(tensors)
        for group, state in self._states():
            for name, value in tensors.items():
                place, _, key = name.partition(f"optimizer.{group['name']}.")
                if not place and key:
                    kind, _, key = key.partition(".")
                    kept = value.to(device) if kind == "tensor" else value.item()
                    state[key] = kept


def learn_rotations(
    learner: RotationLearner,
    windows: torch.Tensor,
    first: int,
    after_step: Callable[[int, dict[str, float]], None],
) -> None:
    """Run the remaining steps; windows: (steps·batch, length) ids, the same for every resume."""
    learn = learner.learn
    bar = tqdm(
        range(first, learn.steps),
        desc="learn",
        initial=first,
        total=learn.steps,
        disable=not parallel.is_main(),
    )
    for index in bar:
        batch = windows[index * learn.batch : (index + 1) * learn.batch]
        curve = learner.step(index, batch)
        bar.set_postfix(loss=f"{curve['loss']:.3f}", refresh=False)
        after_step(index, curve)


def save_progress(learner: RotationLearner, path: Path, curve: list[dict[str, float]]) -> None:
    """Write the learner's state and the curve so far to one file, replaced atomically."""
    save_tensors(path, learner.state(), curve)


def resume(learner: RotationLearner, path: Path) -> list[dict[str, float]]:
    """Continue from saved progress, if there is any and it is sound; return the curve so far."""
    kept = kept_tensors(path)
    if kept is None:
        return []
    tensors, curve = kept
    learner.load_state(tensors)
    log.info("learning resumes after step %d", len(curve))
    return curve
