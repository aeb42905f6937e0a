"""Gated DeltaNet and Mamba2: a state instead of keys and values, updated by each token.

The state S [k, v] of a head is a linear map from keys to values. A token with query q, key k, value
v, decay g and rate b (beta) does in a DeltaNet (arXiv:2412.06464)

    S = g S;  S = S + k (b (v - S^T k))^T;  out = S^T q

and in Mamba2 (arXiv:2405.21060), whose C, B, x and dt are q, k, v and b, and which has a number D

    S = g S;  S = S + k (b v)^T;  out = S^T q + D v

The columns of S do not depend on each other. So an item of work is a block of columns, which stays
in the first cache for all tokens of a call. The order of operations is that of one token after the
other, however many a call has. So a token has the bits that it has alone.

T = tokens, K = heads of keys and queries, V = heads of values, k and v = their widths,
C = 2 K k + V v channels: queries, keys, values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from llvmlite import ir

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.arithmetic import (
    as_fp32,
    exponential,
    reduced,
    sigmoid,
    softplus,
    store_fp32,
)
from mixchat.kernels.cpu.compile import compiled_here
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, vector
from mixchat.kernels.cpu.program import Signature, Step

_BLOCK = 32  # columns of a state that follow one another. Of 128 rows they take 16 KiB.
_TOGETHER = 4  # rows of a state in one turn of the innermost loop
_LINE = 64  # bytes of the cache
_NORM_EPS = 1e-6  # of queries and keys
_FEW = 2**16  # numbers that one thread finishes before a second one has started
_SIGNATURE = Signature(
    "qkv",
    "gates",
    "before",
    "after",
    "out",
    "rates",
    "skips",
    "logits",
    "biases",
    "stride",
    "logits_stride",
    "tokens",
    "key_heads",
    "value_heads",
    "key_dim",
    "value_dim",
    "scale",
    "ahead",
)


@dataclass(frozen=True)
class DeltaNetShape:
    """The heads of a layer. The value heads of one key head follow one another."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Return C."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def block(self) -> int:
        """Return the columns of a block."""
        return math.gcd(self.value_dim, _BLOCK)

    @property
    def block_bytes(self) -> int:
        """Return the bytes of a block of a head's state."""
        return self.key_dim * self.block * 4

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """Return the shape [V, v / block, k, block] of the states, in fp32."""
        return self.value_heads, self.value_dim // self.block, self.key_dim, self.block

    def can_compute(self, dtype: torch.dtype, device_type: str) -> bool:
        """Return whether the kernels take these heads, with inputs of this type."""
        whole = self.key_dim % _TOGETHER == 0 and rows.can_compute(dtype, self.key_dim, device_type)
        return whole and rows.can_compute(dtype, self.value_dim, device_type)


class DeltaRule:
    """Updates the states of a layer, and reads them.

    A_log, dt_bias: [V], as in a checkpoint. skips: Mamba2's D [V]. With it the rule is Mamba2's.
    """

    def __init__(
        self,
        shape: DeltaNetShape,
        a_log: torch.Tensor,
        dt_bias: torch.Tensor,
        skips: torch.Tensor | None = None,
    ) -> None:
        self.shape = shape
        self.rates = -a_log.float().exp()
        self.biases = dt_bias.float().contiguous()
        self.skips = None if skips is None else skips.float().contiguous()

    def __call__(
        self, qkv: torch.Tensor, ba: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        """Return the read values [T, V * v], in the type of ba.

        qkv: [T, C], fp32, rows of a matrix, overwritten. ba: [T, 2V], the logits of the rates, and
        then what the decays depend on, or Mamba2's dt [T, V], which both depend on. `before` is the
        state before these tokens. The state after them is written to `after`.
        """
        if not self.shape.can_compute(ba.dtype, ba.device.type):
            return self._by_torch(qkv, ba, before, after)
        out = torch.empty(
            qkv.shape[0], self.shape.value_heads * self.shape.value_dim, dtype=ba.dtype
        )
        prepare, recur = self.steps(qkv, ba, out)
        recur.set(before=before.data_ptr(), after=after.data_ptr())
        prepare.run()
        recur.run()
        return out

    def _by_torch(
        self, qkv: torch.Tensor, ba: torch.Tensor, before: torch.Tensor, after: torch.Tensor
    ) -> torch.Tensor:
        shape = self.shape
        tokens = qkv.shape[0]
        gates = self.prepare(qkv, ba)[..., None, None]  # [T, V, 2, 1, 1]
        keys = shape.key_heads * shape.key_dim
        repeats = shape.value_heads // shape.key_heads
        heads = qkv[:, : 2 * keys].view(tokens, 2, shape.key_heads, shape.key_dim)
        heads = heads.repeat_interleave(repeats, dim=2)[:, :, :, None, :, None]
        queries = heads[:, 0]
        keys_of_heads = heads[:, 1]
        blocks = shape.value_dim // shape.block
        values = qkv[:, 2 * keys :].view(tokens, shape.value_heads, blocks, shape.block)
        decay = gates[:, :, 0]
        beta = gates[:, :, 1]
        state = before
        read = []
        for token in range(tokens):
            key = keys_of_heads[token]  # [V, 1, k, 1]
            state = state * decay[token][..., None]
            delta = values[token]  # [V, blocks, block]
            if self.skips is None:
                delta = delta - (state * key).sum(2)
            state = state + key * (beta[token] * delta).unsqueeze(2)
            out = (state * queries[token]).sum(2)
            if self.skips is not None:
                out = out + self.skips[:, None, None] * values[token]
            read.append(out)
        after.copy_(state)
        return torch.stack(read).reshape(tokens, -1).to(ba.dtype)

    def prepare(self, qkv: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        """Return decays and rates [T, V, 2], by torch.

        A DeltaNet's queries and keys are normalized in place.
        """
        shape = self.shape
        # At the end of a tensor, torch's sigmoid and softplus have other bits than within it.
        alpha = ba[:, -shape.value_heads :].float() + self.biases
        steps = (-alpha.abs()).exp().log1p() + alpha.clamp(min=0)
        decays = (self.rates * steps).exp()
        if self.skips is not None:
            return torch.stack([decays, steps], dim=-1)
        keys = shape.key_heads * shape.key_dim
        heads = qkv[:, : 2 * keys].view(-1, 2, shape.key_heads, shape.key_dim)
        heads *= torch.rsqrt((heads * heads).sum(-1, keepdim=True) + _NORM_EPS)
        heads[:, 0] *= shape.key_dim**-0.5
        rate = ba[:, : shape.value_heads].float()
        return torch.stack([decays, 1 / (1 + (-rate).exp())], dim=-1)

    def steps(self, qkv: torch.Tensor, ba: torch.Tensor, out: torch.Tensor) -> tuple[Step, Step]:
        """Return `__call__` as steps. `before` and `after` of the second one are not set yet."""
        shape = self.shape
        tokens = qkv.shape[0]
        compiled = _compiled(ba.dtype == torch.bfloat16, shape.block, self.skips is not None)
        recur = _SIGNATURE.step(
            compiled.function("recur"),
            qkv=qkv,
            gates=torch.empty(tokens, shape.value_heads, 2),
            out=out,
            rates=self.rates,
            skips=self.skips,
            logits=ba,
            biases=self.biases,
            stride=qkv.stride(0),
            logits_stride=ba.stride(0),
            tokens=tokens,
            key_heads=shape.key_heads,
            value_heads=shape.value_heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            scale=shape.key_dim**-0.5,
            ahead=torch.get_num_threads() * shape.block_bytes,
        )
        prepare = recur.copy(compiled.function("prepare"))
        prepare.threads = 1 if qkv.numel() <= _FEW else None
        return prepare, recur


@compiled_here
def _compiled(module: ir.Module, lanes: int, bf16: bool, block: int, is_mamba: bool) -> None:
    _Prepare(module, lanes, bf16, is_mamba).write()
    _Recur(module, min(lanes, block), block, bf16, is_mamba).write()


class _Prepare:
    """The function `prepare`, which normalizes queries and keys, and computes decays and rates.

    An item of work is a token. Mamba2 normalizes nothing.
    """

    def __init__(self, module: ir.Module, lanes: int, bf16: bool, is_mamba: bool) -> None:
        self._function = Function(module, "prepare")
        self._lanes = lanes
        self._bf16 = bf16
        self._is_mamba = is_mamba
        self._args = _SIGNATURE.read_by(self._function)

    def write(self) -> None:
        function = self._function
        args = self._args
        value_heads = args.number("value_heads")
        with function.each_item(function.pointer, args.number("tokens")) as token:
            if not self._is_mamba:
                self._normalize_heads(token)
            with function.loop(0, value_heads, 1) as (head, _):
                self._gates(token, head, value_heads)
        function.finish()

    def _normalize_heads(self, token: Value) -> None:
        function = self._function
        args = self._args
        key_heads = args.number("key_heads")
        key_dim = args.number("key_dim")
        scale = args.load("scale", f32)
        one = function.constant(f32, 1.0)
        with function.loop(0, key_heads * 2, 1) as (head, _):
            factor = head.compare("<", key_heads).choose(scale, one)
            start = token * args.number("stride") + head * key_dim
            self._normalize(args.pointer("qkv").plus(start * 4), key_dim, factor)

    def _normalize(self, row: Pointer, width: Value, factor: Value) -> None:
        function = self._function
        floats = vector(f32, self._lanes)
        zeros = function.constant(floats, 0.0)
        with function.loop(0, width, self._lanes, [zeros]) as (column, sums):
            numbers = row.load(floats, column * 4)
            sums[0] = function.multiply_add(numbers, numbers, sums[0])
        total = reduced(function, sums[0], "fadd") + _NORM_EPS
        root = function.call("llvm.sqrt.f32", f32, total)
        scale = (factor / root).broadcast(self._lanes)
        with function.loop(0, width, self._lanes) as (column, _):
            row.store(row.load(floats, column * 4) * scale, column * 4)

    def _gates(self, token: Value, head: Value, value_heads: Value) -> None:
        function = self._function
        args = self._args
        at = token * args.number("logits_stride") + head
        of_decay = at if self._is_mamba else at + value_heads
        alpha = as_fp32(args.pointer("logits"), of_decay, self._bf16)
        step = softplus(function, alpha + args.pointer("biases").load(f32, head * 4))
        decay = exponential(function, args.pointer("rates").load(f32, head * 4) * step)
        target = (token * value_heads + head) * 8
        args.pointer("gates").store(decay, target)
        if not self._is_mamba:
            step = sigmoid(function, as_fp32(args.pointer("logits"), at, self._bf16))
        args.pointer("gates").store(step, target + 4)


class _Recur:
    """The function `recur`. An item of work is a block of columns of a head's state.

    One pass over the block updates it by a token, and reads it for the token's query and for the
    next token's key. Before the first token a pass reads it for the first key alone. Mamba2 does
    not read it for keys.
    """

    def __init__(
        self, module: ir.Module, lanes: int, block: int, bf16: bool, is_mamba: bool
    ) -> None:
        self._function = Function(module, "recur")
        self._lanes = lanes
        self._block = block
        self._bf16 = bf16
        self._is_mamba = is_mamba
        self._floats = vector(f32, lanes)
        self._args = _SIGNATURE.read_by(self._function)
        self._offsets = [number * lanes * 4 for number in range(block // lanes)]

    def write(self) -> None:
        function = self._function
        args = self._args
        block = self._block
        key_heads = args.number("key_heads")
        value_heads = args.number("value_heads")
        key_dim = args.number("key_dim")
        last = args.number("tokens") - 1
        blocks = args.number("value_dim") // block
        row_bytes = args.number("stride") * 4
        with function.each_item(function.pointer, value_heads * blocks) as item:
            head = item // blocks
            start = item * key_dim * (block * 4)
            key_head = head // (value_heads // key_heads)
            before, after = (args.number(name) + start for name in ("before", "after"))
            # Of the first token. The rows of the others follow.
            queries = args.pointer("qkv").plus(key_head * key_dim * 4)
            keys = queries.plus(key_heads * key_dim * 4)
            values = args.pointer("qkv").plus((key_heads * key_dim * 2 + item * block) * 4)

            def update(
                token: Value,
                predicted: list[Value],
                next_keys: Pointer | None = None,
                *,
                past_caches: bool = False,
            ) -> list[Value]:
                offset = token * row_bytes
                gates = args.pointer("gates").plus((token * value_heads + head) * 8)
                decay, rate = (gates.load(f32, at).broadcast(self._lanes) for at in (0, 4))
                own = [values.load(self._floats, offset + at) for at in self._offsets]
                deltas = [rate * value for value in own]
                if not self._is_mamba:
                    deltas = [
                        rate * (value - decay * prediction)
                        for value, prediction in zip(own, predicted, strict=True)
                    ]
                source = function.address(token.compare("==", 0).choose(before, after))
                factors = queries.plus(offset), keys.plus(offset), next_keys
                target = function.address(after)
                store = target.store_past_caches if past_caches else target.store
                read, predicted = self._pass(
                    source, store, factors, decay, deltas, prefetches=past_caches
                )
                if self._is_mamba:
                    skip = args.pointer("skips").load(f32, head * 4).broadcast(self._lanes)
                    pairs = zip(own, read, strict=True)
                    read = [function.multiply_add(value, skip, total) for value, total in pairs]
                first = (token * value_heads * blocks + item) * block
                for number, value in enumerate(read):
                    index = first + number * self._lanes
                    store_fp32(args.pointer("out"), value, index, self._bf16)
                return predicted

            predicted = []
            if not self._is_mamba:
                predicted = self._predict(function.address(before), keys)
            with function.loop(0, last, 1, predicted) as (token, carried):
                next_keys = None if self._is_mamba else keys.plus((token + 1) * row_bytes)
                carried[:] = update(token, list(carried), next_keys)
            # All layers' states of one token are larger than caches.
            streams = last.compare("==", 0) & (args.number("after") % _LINE).compare("==", 0)
            with function.when(streams):
                update(last, carried, past_caches=True)
            with function.when(streams.compare("==", 0)):
                update(last, carried)
        function.finish()

    def _predict(self, state: Pointer, keys: Pointer) -> list[Value]:
        """Return S^T k."""
        function = self._function
        zero = self._function.constant(self._floats, 0.0)
        key_dim = self._args.number("key_dim")
        zeros = [zero] * len(self._offsets)
        with function.loop(0, key_dim, _TOGETHER, zeros) as (first, sums):
            for row in range(_TOGETHER):
                key = keys.load(f32, (first + row) * 4).broadcast(self._lanes)
                for number, at in enumerate(self._offsets):
                    state_row = state.load(self._floats, (first + row) * (self._block * 4) + at)
                    sums[number] = function.multiply_add(state_row, key, sums[number])
        return sums

    def _pass(
        self,
        source: Pointer,
        store: Callable[[Value, Value], None],
        factors: tuple[Pointer, Pointer, Pointer | None],
        decay: Value,
        deltas: list[Value],
        *,
        prefetches: bool,
    ) -> tuple[list[Value], list[Value]]:
        """Update the block of `source`, and store it. Return S^T q, and S^T k of the next token.

        factors: the query, the key and the next token's key, if there is one. prefetches: the block
        that this thread will probably take next, so that memory is read while it is written, too.
        """
        function = self._function
        zero = self._function.constant(self._floats, 0.0)
        count = len(deltas)
        lanes = self._lanes
        queries, keys, next_keys = factors
        zeros = [zero] * (count if next_keys is None else 2 * count)
        with function.loop(0, self._args.number("key_dim"), _TOGETHER, zeros) as (first, sums):
            for row in range(_TOGETHER):
                at = (first + row) * 4
                query, key = (pointer.load(f32, at).broadcast(lanes) for pointer in (queries, keys))
                if prefetches:
                    for line in range(0, self._block * 4, _LINE):
                        ahead = self._args.number("ahead") + line
                        source.prefetch(at * self._block + ahead, second=True)
                for number, offset in enumerate(self._offsets):
                    column = at * self._block + offset
                    state = source.load(self._floats, column) * decay
                    state = function.multiply_add(key, deltas[number], state)
                    store(state, column)
                    sums[number] = function.multiply_add(state, query, sums[number])
                    if next_keys is not None:
                        next_key = next_keys.load(f32, at).broadcast(lanes)
                        index = count + number
                        sums[index] = function.multiply_add(state, next_key, sums[index])
        return sums[:count], sums[count:]
