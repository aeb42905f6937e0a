"""Chooses the best experts of each token, by their logits or by scores that are made of them.

T = tokens, D = columns, E = experts, K = experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from llvmlite import ir
from torch.nn import functional

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.arithmetic import as_fp32, exponential, sigmoid, softcapped
from mixchat.kernels.cpu.compile import compiled_here
from mixchat.kernels.cpu.emit import Function, Value, f32, i64, vector
from mixchat.kernels.cpu.program import Signature, Step

LEAST_SUM = 1e-20  # is added to a sum of scores, which may be 0
_FEW = 4  # tokens that one thread finishes before a second one has started
_TOGETHER = 4  # logits of a token that are summed up at once, so that no sum waits for itself
# Ranks. Experts not yet chosen are above `_START`, however low their logits are. As in torch, NaN
# is above all numbers.
_CHOSEN = -3.4e38
_START = -3.3e38
_LOWEST = -3.2e38
_NO_NUMBER = 3.4e38
_SIGNATURE = Signature(
    "x",
    "gate",
    "bias",
    "logits",
    "ranks",
    "experts",
    "weights",
    "tokens",
    "columns",
    "count",
    "choices",
    "unchosen",
    "correction",
    "scaling",
    "scales",
    "cap",
)

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class _GroupLimits:
    """Groups of experts, of which some are chosen by the sum of their `best` best experts."""

    groups: int
    chosen: int
    best: Literal[1, 2]

    def limited(self, ranks: torch.Tensor) -> torch.Tensor:
        """Return ranks [T, E] with the lowest number for the experts of other groups."""
        if self.groups == 1:
            return ranks
        grouped = ranks.view(len(ranks), self.groups, -1)
        best = min(self.best, grouped.shape[-1])
        order = grouped.topk(best, dim=-1).values.sum(dim=-1).sort(descending=True, stable=True)
        hidden = torch.ones(grouped.shape[:2], dtype=torch.bool, device=ranks.device)
        hidden.scatter_(1, order.indices[:, : self.chosen], False)
        return grouped.masked_fill(hidden[..., None], -torch.inf).view_as(ranks)


_NO_LIMITS = _GroupLimits(1, 1, 1)


@dataclass(frozen=True)
class Router:
    """Chooses the experts [T, K] with the largest logits, the first of equal ones.

    gate: fp32 or bf16 [E, D], contiguous. bias: fp32 [E], which is added to the logits.
    normalized: whether the weights of the K chosen experts sum to one.
    scoring: makes an expert's weight of the logits.
    correction: fp32 [E], which is added to these scores for the choice, and not for the weights.
    scaling: multiplies the weights.
    groups: the experts, in their order, are so many groups of equal size. The experts are chosen of
    `chosen_groups` of these, those with the best expert, or with a correction those whose two best
    experts have the largest sum.
    scales: fp32 [E], which multiply the weights of their experts.
    cap: logits become tanh(logits / cap) * cap.
    """

    gate: torch.Tensor
    choices: int
    normalized: bool = True
    bias: torch.Tensor | None = None
    scoring: Scoring = "softmax"
    correction: torch.Tensor | None = None
    scaling: float = 1.0
    groups: int = 1
    chosen_groups: int = 1
    scales: torch.Tensor | None = None
    cap: float | None = None

    @property
    def _scores(self) -> Scoring | None:
        """Return the scoring by which experts are chosen, None if their logits decide."""
        is_scaled = self.scaling != 1 or self.scales is not None
        plain = self.scoring == "softmax" and self.correction is None and not is_scaled
        return None if plain and self.groups == 1 else self.scoring

    @property
    def _limits(self) -> _GroupLimits:
        return _GroupLimits(self.groups, self.chosen_groups, 1 if self.correction is None else 2)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the experts [T, K], int64, best first, and their weights [T, K], fp32.

        The logits are x [T, D] times the gate in fp32, because rounding could change the choice.
        """
        if not rows.can_compute(x.dtype, x.shape[1], x.device.type):
            return self._by_torch(x)
        x, tokens = x.contiguous(), x.shape[0]
        experts = torch.empty(tokens, self.choices, dtype=torch.int64)
        weights = torch.empty(tokens, self.choices)
        for step in self.steps(x, experts, weights):
            step.run()
        return experts, weights

    def _by_torch(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = functional.linear(x.float(), self.gate.float(), self.bias)  # [T, E]
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        if self._scores is not None:
            scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(dim=-1)
            ranks = scores if self.correction is None else scores + self.correction
            ranks = self._limits.limited(ranks)
            order = ranks.sort(dim=-1, descending=True, stable=True).indices[:, : self.choices]
            chosen = scores.gather(1, order)
            if self.normalized:
                chosen = chosen / (chosen.sum(dim=-1, keepdim=True) + LEAST_SUM)
            chosen = chosen * self.scaling
            return order, chosen if self.scales is None else chosen * self.scales[order]
        # Of equal logits, topk takes any.
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        counted = ranked[:, : self.choices] if self.normalized else ranked
        return order[:, : self.choices], counted.softmax(dim=-1)[:, : self.choices]

    def steps(
        self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor
    ) -> tuple[Step, Step]:
        """Return `__call__` as steps that write experts and weights. x is contiguous.

        The second one needs the first.
        """
        tokens = experts.shape[0]
        count = self.gate.shape[0]
        logits, ranks = torch.empty(2, tokens, count)
        form = _ScoreForm(
            x.dtype == torch.bfloat16,
            self.gate.dtype == torch.bfloat16,
            self.bias is not None,
            self.cap is not None,
        )
        compiled = _compiled(form, self._scores, self._limits)
        score = _SIGNATURE.step(
            compiled.function("score"),
            threads=1 if tokens <= _FEW else None,
            x=x,
            gate=self.gate,
            bias=self.bias,
            logits=logits,
            ranks=ranks,
            experts=experts,
            weights=weights,
            tokens=tokens,
            columns=x.shape[1],
            count=count,
            choices=self.choices,
            unchosen=0 if self.normalized else count,
            correction=torch.zeros(count) if self.correction is None else self.correction,
            scaling=float(self.scaling),
            scales=torch.ones(count) if self.scales is None else self.scales,
            cap=float(self.cap or 0.0),
        )
        return score, score.copy(compiled.function("choose"))


class _ScoreForm(NamedTuple):
    """The types that logits are computed of, and what is done to them."""

    x_bf16: bool
    gate_bf16: bool
    biased: bool
    capped: bool


@compiled_here
def _compiled(
    module: ir.Module,
    lanes: int,
    form: _ScoreForm,
    scores: Scoring | None,
    limits: _GroupLimits,
) -> None:
    _Score(module, lanes, form).write()
    (_Choose(module) if scores is None else _ChooseByScores(module, scores, limits)).write()


class _Score:
    """A function that computes logits. An item of work is `_TOGETHER` experts of a token."""

    def __init__(self, module: ir.Module, lanes: int, form: _ScoreForm) -> None:
        self._function = Function(module, "score")
        self._lanes = lanes
        self._form = form
        self._args = _SIGNATURE.read_by(self._function)

    def write(self) -> None:
        function = self._function
        args = self._args
        count = args.number("count")
        groups = (count + _TOGETHER - 1) // _TOGETHER
        with function.each_item(function.pointer, args.number("tokens") * groups) as item:
            token = item // groups
            first = item % groups * _TOGETHER
            # Beyond the last expert, the last one is computed again.
            experts = [function.minimum(first + number, count - 1) for number in range(_TOGETHER)]
            for expert, logit in zip(experts, self._logits(token, experts), strict=True):
                target = (token * count + expert) * 4
                args.pointer("logits").store(logit, target)
                args.pointer("ranks").store(_rank(function, logit), target)
        function.finish()

    def _logits(self, token: Value, experts: Sequence[Value]) -> list[Value]:
        function = self._function
        args = self._args
        lanes = self._lanes
        columns = args.number("columns")
        zeros = function.constant(vector(f32, lanes), 0.0)
        with function.loop(0, columns, lanes, [zeros] * len(experts)) as (column, sums):
            x = as_fp32(args.pointer("x"), token * columns + column, self._form.x_bf16, lanes)
            for number, expert in enumerate(experts):
                index = expert * columns + column
                row = as_fp32(args.pointer("gate"), index, self._form.gate_bf16, lanes)
                sums[number] = function.multiply_add(x, row, sums[number])
        logits = [function.total(lanes_sum) for lanes_sum in sums]
        if self._form.biased:
            bias = args.pointer("bias")
            logits = [
                logit + bias.load(f32, expert * 4)
                for expert, logit in zip(experts, logits, strict=True)
            ]
        if self._form.capped:
            cap = args.load("cap", f32)
            logits = [softcapped(function, logit, cap) for logit in logits]
        return logits


def _rank(function: Function, logit: Value) -> Value:
    """Return the logit, or a finite number for NaN."""
    finite = function.maximum(logit, function.constant(f32, _LOWEST))
    return logit.compare("==", logit).choose(finite, _NO_NUMBER)


class _Choose:
    """A function that chooses experts by their logits. An item of work is a token."""

    def __init__(self, module: ir.Module) -> None:
        self._function = Function(module, "choose")
        self._args = _SIGNATURE.read_by(self._function)

    def write(self) -> None:
        function = self._function
        args = self._args
        count = args.number("count")
        choices = args.number("choices")
        with function.each_item(function.pointer, args.number("tokens")) as token:
            first = token * choices
            self._score(token * count, count)
            with function.loop(first, first + choices, 1) as (index, _):
                # The best expert not yet chosen, and its logit in the place of its weight.
                ranks = args.pointer("ranks")
                start = [function.constant(i64, 0), function.constant(f32, _START)]
                with function.loop(0, count, 1, start) as (expert, best):
                    rank = ranks.load(f32, (token * count + expert) * 4)
                    is_better = rank.compare(">", best[1])
                    best[:] = is_better.choose(expert, best[0]), is_better.choose(rank, best[1])
                offset = (token * count + best[0]) * 4
                ranks.store(function.constant(f32, _CHOSEN), offset)
                logit = args.pointer("logits").load(f32, offset)
                args.pointer("experts").store(best[0], index * 8)
                args.pointer("weights").store(logit, index * 4)
            self._soften(token, first, choices)
        function.finish()

    def _score(self, first: Value, count: Value) -> None:
        """Turn the token's logits into what it is chosen by, which logits are already."""

    def _soften(self, token: Value, first: Value, choices: Value) -> None:
        """Turn logits into weights. The first logit is the largest."""
        function = self._function
        weights = self._args.pointer("weights")
        largest = weights.load(f32, first * 4)
        zero = function.constant(f32, 0.0)
        with function.loop(first, first + choices, 1, [zero]) as (index, sums):
            power = self._power(weights.load(f32, index * 4) - largest)
            weights.store(power, index * 4)
            sums[0] = sums[0] + power
        total = sums[0] + self._unchosen(token, largest)
        with function.loop(first, first + choices, 1) as (index, _):
            weights.store(weights.load(f32, index * 4) / total, index * 4)

    def _unchosen(self, token: Value, largest: Value) -> Value:
        """Return the sum of the powers of the experts that were not chosen, if they count."""
        function = self._function
        args = self._args
        zero = function.constant(f32, 0.0)
        first = token * args.number("count")
        with function.loop(0, args.number("unchosen"), 1, [zero]) as (expert, sums):
            offset = (first + expert) * 4
            is_unchosen = args.pointer("ranks").load(f32, offset).compare(">", _START)
            logit = args.pointer("logits").load(f32, offset)
            sums[0] = sums[0] + is_unchosen.choose(self._power(logit - largest), 0.0)
        return sums[0]

    def _power(self, below: Value) -> Value:
        """Return e^below. NaN stays NaN."""
        return below.compare("==", below).choose(exponential(self._function, below), below)


class _ChooseByScores(_Choose):
    """A function that turns logits into scores, and chooses experts by them and a correction."""

    def __init__(self, module: ir.Module, scores: Scoring, limits: _GroupLimits) -> None:
        super().__init__(module)
        self._scores = scores
        self._limits = limits
        self._group_scores = self._function.scratch(limits.groups * 4)

    def _score(self, first: Value, count: Value) -> None:
        function = self._function
        args = self._args
        logits = args.pointer("logits")
        ranks = args.pointer("ranks")
        if self._scores == "softmax":
            start = function.constant(f32, _CHOSEN)
            with function.loop(first, first + count, 1, [start]) as (index, best):
                best[0] = function.maximum(logits.load(f32, index * 4), best[0])
            largest = best[0]
            zero = function.constant(f32, 0.0)
            with function.loop(first, first + count, 1, [zero]) as (index, sums):
                sums[0] = sums[0] + self._power(logits.load(f32, index * 4) - largest)
            total = sums[0]
        with function.loop(0, count, 1) as (expert, _):
            offset = (first + expert) * 4
            logit = logits.load(f32, offset)
            if self._scores == "softmax":
                score = self._power(logit - largest) / total
            else:
                # NaN stays NaN, so that a broken token is noticed.
                score = logit.compare("==", logit).choose(sigmoid(function, logit), logit)
            logits.store(score, offset)
            corrected = score + args.pointer("correction").load(f32, expert * 4)
            ranks.store(_rank(function, corrected), offset)
        if self._limits.groups > 1:
            self._limit(first, count)

    def _limit(self, first: Value, count: Value) -> None:
        """Leave only the experts of the best groups to the choice."""
        function = self._function
        limits = self._limits
        scores = self._group_scores
        ranks = self._args.pointer("ranks")
        size = count // limits.groups
        with function.loop(0, limits.groups, 1) as (group, _):
            start = first + group * size
            lowest = function.constant(f32, _CHOSEN)
            with function.loop(start, start + size, 1, [lowest, lowest]) as (index, best):
                rank = ranks.load(f32, index * 4)
                best[1] = function.maximum(function.minimum(rank, best[0]), best[1])
                best[0] = function.maximum(rank, best[0])
            scores.store(best[0] if limits.best == 1 else best[0] + best[1], group * 4)
        with function.loop(0, limits.groups, 1) as (group, _):
            score = scores.load(f32, group * 4)
            with function.loop(0, limits.groups, 1, [function.constant(i64, 0)]) as (rival, before):
                own = scores.load(f32, rival * 4)
                # Of equal groups, the first one.
                is_first = own.compare("==", score) & rival.compare("<", group)
                is_before = own.compare(">", score) | is_first
                before[0] = before[0] + is_before.choose(function.constant(i64, 1), 0)
            with function.when(before[0].compare(">=", limits.chosen)):
                start = first + group * size
                with function.loop(start, start + size, 1) as (index, _):
                    ranks.store(function.constant(f32, _CHOSEN), index * 4)

    def _soften(self, token: Value, first: Value, choices: Value) -> None:
        """Normalize the scores of the chosen experts, if asked, and scale them."""
        function = self._function
        args = self._args
        weights = self._args.pointer("weights")
        zero = function.constant(f32, 0.0)
        scaling = args.load("scaling", f32)
        with function.loop(first, first + choices, 1, [zero]) as (index, sums):
            sums[0] = sums[0] + weights.load(f32, index * 4)
        is_normalized = args.number("unchosen").compare("==", 0)
        total = is_normalized.choose(sums[0] + LEAST_SUM, 1.0)
        with function.loop(first, first + choices, 1) as (index, _):
            scale = args.pointer("scales").load(
                f32, args.pointer("experts").load(i64, index * 8) * 4
            )
            weights.store(weights.load(f32, index * 4) / total * scaling * scale, index * 4)
