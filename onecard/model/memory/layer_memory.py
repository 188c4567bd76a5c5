"""What a decoder layer and the loss hold on the card, written down as their forward pass and played on a tape.

The order of operations is that of transformers' Llama family (RMSNorm, rotary attention, gated MLP) under PEFT's LoRA
layers; other families differ by what `Shape` says of them. Knows which tensor is kept for the backward pass and which
copy is made on the way. Does not know how many layers there are or what else lies on the card: `estimate.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from onecard.model.chunked_loss import CAPPED_BYTES_PER_LOGIT, CHUNK_BYTES_PER_LOGIT
from onecard.model.memory.families import LLAMA, Style
from onecard.model.memory.tape import PASSES_ON, Back, Sized, Tape

FP32 = 4
PLAIN_BYTES_PER_LOGIT = 12  # of cross-entropy over all logits at once, whatever their format; counted, 11.8


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: (n_in) -> (n_out); `rank` 0 where it has no adapter."""

    n_in: int
    n_out: int
    rank: int


@dataclass(frozen=True)
class Shape:
    """One decoder layer over one micro-batch. Sizes are numbers of values, not bytes."""

    rows: int
    length: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    attention_in: tuple[LinearShape, ...]
    """q, k and v, or one that makes all three."""
    attention_out: LinearShape
    mlp_in: tuple[LinearShape, ...]
    """gate and up, or one that makes both."""
    mlp_out: LinearShape
    element_bytes: int
    """2 under autocast (fp16, bf16), 4 in fp32."""
    bits: int
    style: Style = LLAMA
    repeats_kv: bool = False
    """Keys and values are copied for each query head: the memory-efficient kernel of older cards needs that."""
    eager: bool = False
    """A (seq, seq) matrix of scores exists for every head."""
    checkpointed: bool = True
    drops: bool = False
    """Adapters have dropout, whose masks are kept: a byte for each value on a card, as wide as the value on a CPU."""
    tile_tokens: int = 0
    """Tokens that pass through the MLP at once; 0: all."""
    on_gpu: bool = True

    @property
    def casts_adapter_input(self) -> bool:
        """PEFT asks whether autocast is on for CUDA; where it is on for the CPU only, inputs go to fp32 and back."""
        return self.element_bytes != FP32 and not self.on_gpu

    @property
    def keeps_output(self) -> bool:
        """A layer over 8-bit weights is checkpointed reentrantly (see `load.py`), which computes all of it again."""
        return self.bits == 8

    @property
    def stops_early(self) -> bool:
        """Computed again, the layer is left where its last adapter has saved its input; nothing after it saves any."""
        return self.checkpointed and not self.keeps_output and not self.style.norms_out

    @property
    def early_bytes(self) -> int:
        """Gradients that exist before the layer is asked for again: of what ends it and needs nothing of it."""
        if self.stops_early:
            # Of the last adapter's scaling, or of the last tile's.
            share = self.tile_tokens / self.tokens if 0 < self.tile_tokens < self.tokens else 1
            return int(self.hidden_bytes * (share + self.style.scales_residual))
        casts = self.style.norm == "gemma" and self.style.norms_out and self.element_bytes != FP32
        return self.tokens * self.hidden_size * FP32 if casts and not self.keeps_output else 0

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def hidden_bytes(self) -> int:
        """One hidden state of the micro-batch."""
        return self.tokens * self.hidden_size * self.element_bytes


def layer_peak(shape: Shape) -> int:
    """The most bytes alive at once while one checkpointed layer is computed again and its gradients are made.

    The layer's input is not counted: `estimate.py` does. The gradient from above is, and the one of the input.
    """
    tape = Tape()
    x, gradient = tape.elsewhere(shape.hidden_bytes, needs_grad=True), tape.new(shape.hidden_bytes)
    early = tape.new(shape.early_bytes)
    out = decoder_layer(tape, x, shape)
    end = out.node
    if not shape.keeps_output:
        del out
    del early
    tape.backward(end, gradient)
    return tape.peak_bytes


def stack_peak(shape: Shape, n_layers: int, *, learns_input: bool = False) -> tuple[int, int]:
    """What `n_layers` layers without checkpoints keep for their gradients, and their worst moment in the backward."""
    tape = Tape()
    x = tape.new(shape.hidden_bytes, needs_grad=learns_input)  # of frozen embeddings it needs no gradient
    for _ in range(n_layers):
        x = decoder_layer(tape, x, shape)
    kept, end = tape.live_bytes - shape.hidden_bytes, x.node
    del x
    tape.backward(end, tape.new(shape.hidden_bytes))
    return kept, tape.peak_bytes


def loss_peak(shape: Shape, vocab_size: int, loss_chunk: int, head_bits: int, trained: tuple[int, int] = (0, 0)) -> int:
    """The worst moment from the last layer's output to its gradient: the norm, the head and the loss of every token.

    loss_chunk: tokens whose logits exist at once, see `chunked_loss.py`; 0: all, as cross-entropy does it.
    """
    tape = Tape()
    x = tape.new(shape.hidden_bytes, needs_grad=True)
    y = _norm(tape, x, shape)
    del x
    unpacked = trained[1] + (shape.hidden_size * vocab_size * shape.element_bytes if head_bits < 16 else 0)
    if head_bits == 8 and shape.element_bytes != FP32 and not shape.on_gpu:
        # bitsandbytes on a CPU scales it in fp32 and makes a copy of that.
        unpacked += 2 * shape.hidden_size * vocab_size * FP32
    if loss_chunk:
        gradient = tape.new(shape.hidden_bytes)
        n_rows = min(loss_chunk, shape.tokens)
        chunk = n_rows * shape.hidden_size * shape.element_bytes
        by_bits = CAPPED_BYTES_PER_LOGIT if shape.style.caps_logits else CHUNK_BYTES_PER_LOGIT
        logits = n_rows * vocab_size * by_bits[8 * shape.element_bytes]
        tape.use(trained[0] + 2 * chunk + max(logits, n_rows * vocab_size * shape.element_bytes + unpacked))
    else:
        per_logit = PLAIN_BYTES_PER_LOGIT + FP32 * shape.style.caps_logits
        at_head = unpacked + shape.tokens * vocab_size * shape.element_bytes + shape.hidden_bytes
        tape.use(trained[0] + max(shape.tokens * vocab_size * per_logit, at_head if unpacked else 0))
        gradient = tape.new(shape.hidden_bytes)
    end = y.node
    del y
    tape.backward(end, gradient)
    return tape.peak_bytes


def decoder_layer(tape: Tape, x: Sized, shape: Shape) -> Sized:
    """The forward pass of one layer; x and the answer are hidden states."""
    style = shape.style
    if style.parallel:
        normed = _norm(tape, x, shape)
        attended = _attention(tape, normed, shape)
        inner = _mlp(tape, normed, shape)
        del normed
        return _add(tape, _add(tape, x, attended, shape), inner, shape)
    inner = _attention(tape, _norm(tape, x, shape) if style.norms_in else x, shape)
    x = _add(tape, x, _norm(tape, inner, shape) if style.norms_out else inner, shape)
    del inner
    inner = _mlp(tape, _norm(tape, x, shape) if style.norms_in else x, shape)
    return _add(tape, x, _norm(tape, inner, shape) if style.norms_out else inner, shape)


def _norm(tape: Tape, x: Sized, shape: Shape, width: int = 0) -> Sized:
    """The family's norm over `width` values (0: a hidden state)."""
    n_rows = x.n_bytes // shape.element_bytes // (width or shape.hidden_size)
    return rms_norm(tape, x, shape, n_rows) if shape.style.norm != "cohere" else _written_norm(tape, x, shape, n_rows)


def rms_norm(tape: Tape, x: Sized, shape: Shape, n_rows: int) -> Sized:
    """RMSNorm in fp32; under autocast the result goes back to 16 bits, before its weight or, in Gemma, after it."""
    n_values = x.n_bytes // shape.element_bytes
    mixed = shape.element_bytes != FP32
    wide = tape.op([x], n_values * FP32) if mixed else x
    squares = tape.op([wide], n_values * FP32, Back([wide], temporary=2 * n_values * FP32))
    variance = tape.op([squares], n_rows * FP32)
    del squares
    inverse = tape.op([variance], n_rows * FP32, Back(saves_output=True), temporary=n_rows * FP32)
    del variance
    normal = tape.op([wide, inverse], n_values * FP32, Back([wide, inverse], temporary=n_values * FP32))
    del wide, inverse
    if mixed and shape.style.norm == "gemma":
        normal = tape.op([normal], n_values * FP32)
    elif mixed:
        normal = tape.op([normal], x.n_bytes)
    return tape.op([normal], x.n_bytes)


def _written_norm(tape: Tape, x: Sized, shape: Shape, n_rows: int) -> Sized:
    """LayerNorm in fp32, as Cohere writes it: the mean is taken off twice."""
    n_bytes = x.n_bytes * FP32 // shape.element_bytes
    mixed = shape.element_bytes != FP32
    wide = tape.op([x], n_bytes) if mixed else x
    mean = tape.op([wide], n_rows * FP32)
    centred = tape.op([wide, mean], n_bytes, PASSES_ON)
    squares = tape.op([centred], n_bytes, Back([centred], temporary=2 * n_bytes))
    variance = tape.op([squares], n_rows * FP32)
    del squares
    centred = tape.op([wide, mean], n_bytes, PASSES_ON)
    del wide, mean
    inverse = tape.op([variance], n_rows * FP32, Back(saves_output=True), temporary=n_rows * FP32)
    normal = tape.op([centred, inverse], n_bytes, Back([centred, inverse], temporary=n_bytes))
    del centred, inverse
    normal = tape.op([normal], n_bytes)
    return tape.op([normal], x.n_bytes) if mixed else normal


def linear(tape: Tape, x: Sized, layer: LinearShape, shape: Shape, *, is_last: bool = False) -> Sized:
    """A frozen linear layer with its adapter beside it: base(x) + scaling * B(A(x)). is_last: of its decoder layer."""
    out_bytes = shape.tokens * layer.n_out * shape.element_bytes
    unpacked = layer.n_in * layer.n_out * shape.element_bytes if shape.bits in (4, 8) else 0
    whole_numbers = shape.tokens * (layer.n_in + layer.n_out * FP32)  # of 8 bits: the input, and the product in int32
    forward = whole_numbers if shape.bits == 8 and shape.on_gpu else unpacked
    out = tape.op([x], out_bytes, Back(temporary=unpacked, gives_views=True), temporary=forward)
    if shape.bits == 4:
        out = tape.op([out], out_bytes, PASSES_ON)  # PEFT clones the result of 4-bit layers
    if shape.bits == 8:
        tape.hold(x)  # bitsandbytes keeps the input of its 8-bit layers until the whole graph is gone
    if not layer.rank:
        return out
    side = whole = x
    if shape.casts_adapter_input:
        side = whole = tape.op([x], x.n_bytes * FP32 // shape.element_bytes)
    if shape.drops:
        mask_bytes = x.n_bytes // shape.element_bytes if shape.on_gpu else side.n_bytes
        side = tape.op([side], side.n_bytes, Back([tape.new(mask_bytes)]))
    if shape.casts_adapter_input:
        side = tape.op([side], x.n_bytes)
    x = side
    del side
    narrow = tape.op([x], shape.tokens * layer.rank * shape.element_bytes, _adapter(tape, x, layer.n_in, layer, shape))
    adapter = _adapter(tape, narrow, layer.n_out, layer, shape)
    if is_last and shape.stops_early:
        tape.stop()
    wide = tape.op([narrow], out_bytes, adapter)
    del narrow
    wide = tape.op([wide], out_bytes)
    out = tape.op([out, wide], out_bytes, PASSES_ON)
    del whole  # PEFT holds its adapter's input, in fp32 where it was cast, until here
    return out


def _adapter(tape: Tape, x: Sized, n_side: int, layer: LinearShape, shape: Shape) -> Back:
    """What an adapter matrix (rank x n_side) keeps: its input, under autocast a 16-bit copy of itself, its gradient."""
    n_values = layer.rank * n_side
    saves, gradient = [x], n_values * FP32
    if shape.element_bytes != FP32:
        saves.append(tape.new(n_values * shape.element_bytes))
        gradient += n_values * shape.element_bytes
    return Back(saves, trained=[gradient], gives_views=True)


def _attention(tape: Tape, x: Sized, shape: Shape) -> Sized:
    parts = [linear(tape, x, layer, shape) for layer in shape.attention_in]
    per_head = shape.tokens * shape.head_dim * shape.element_bytes
    query, key, value = parts if len(parts) == 3 else _split(tape, parts[0], shape, per_head)
    del parts
    query, key = (_heads(tape, side, shape) for side in (query, key))
    query, key = _rotate(tape, query, shape), _rotate(tape, key, shape)
    if shape.repeats_kv and shape.n_kv_heads < shape.n_heads:
        key, value = (tape.op([side], shape.n_heads * per_head) for side in (key, value))
    attend = _eager_attention if shape.eager else _scaled_dot_product
    out = attend(tape, query, key, value, shape)
    del query, key, value
    if shape.style.rotary == "partial":
        out = tape.op([out], out.n_bytes)  # it lies as the joined queries do, head by head, and is put in order
    return linear(tape, out, shape.attention_out, shape)


def _split(tape: Tape, fused: Sized, shape: Shape, per_head: int) -> list[Sized]:
    sizes = (shape.n_heads, shape.n_kv_heads, shape.n_kv_heads)
    return [tape.op([fused], n * per_head, is_view=True) for n in sizes]


def _heads(tape: Tape, x: Sized, shape: Shape) -> Sized:
    """(batch, seq, heads, dim) seen as (batch, heads, seq, dim); its gradient is copied back into the first order."""
    if shape.style.qk_norm:
        width = shape.head_dim if shape.style.qk_norm == 1 else x.n_bytes // (shape.tokens * shape.element_bytes)
        x = _norm(tape, x, shape, width)
    return tape.op([x], x.n_bytes, is_view=True)


def _rotate(tape: Tape, x: Sized, shape: Shape) -> Sized:
    """Rotary positions: x * cos + rotate_half(x) * sin, of all of each head or of its first part."""
    if shape.style.rotary == "half":
        return _rotate_all(tape, x)
    if shape.style.rotary == "interleaved":
        mixed = shape.element_bytes != FP32
        turned = _rotate_all(tape, tape.op([x], x.n_bytes * FP32 // shape.element_bytes) if mixed else x)
        return tape.op([turned], x.n_bytes) if mixed else turned
    part = tape.op([x], int(x.n_bytes * shape.style.rotary_share), is_view=True)
    rest = tape.op([x], x.n_bytes - part.n_bytes, is_view=True)
    return tape.op([_rotate_all(tape, part), rest], x.n_bytes, PASSES_ON)


def _rotate_all(tape: Tape, x: Sized) -> Sized:
    plain = tape.op([x], x.n_bytes)
    first, second = (tape.op([x], x.n_bytes, is_view=True) for _ in range(2))
    del x
    minus = tape.op([second], plain.n_bytes // 2)
    turned = tape.op([minus, first], plain.n_bytes, PASSES_ON)
    del minus, first, second
    turned = tape.op([turned], plain.n_bytes)
    return tape.op([plain, turned], plain.n_bytes, PASSES_ON)


def _scaled_dot_product(tape: Tape, query: Sized, key: Sized, value: Sized, shape: Shape) -> Sized:
    """Attention whose kernel keeps one number per query beside its inputs and output."""
    logsumexp = tape.new(shape.tokens * shape.n_heads * FP32)
    return tape.op([query, key, value], query.n_bytes, Back([query, key, value, logsumexp], saves_output=True))


def _eager_attention(tape: Tape, query: Sized, key: Sized, value: Sized, shape: Shape) -> Sized:
    """Attention whose scores (batch, heads, seq, seq) all exist: each step of the arithmetic makes another of them."""
    scores = shape.rows * shape.n_heads * shape.length**2
    n_bytes = scores * shape.element_bytes
    if shape.n_kv_heads < shape.n_heads:
        key, value = (tape.op([side], query.n_bytes) for side in (key, value))
    query = tape.op([query], query.n_bytes)  # a matrix product over (batch * heads) wants them side by side
    weights = tape.op([query, key], n_bytes, Back([query, key], gives_views=True))
    del query, key
    weights = tape.op([weights], n_bytes)
    if shape.style.caps_scores:
        weights = tape.op([weights], n_bytes)
        weights = tape.op([weights], n_bytes, Back(saves_output=True))
        weights = tape.op([weights], n_bytes)
    weights = tape.op([weights], n_bytes, PASSES_ON)  # the mask is added
    if shape.element_bytes != FP32:
        weights = tape.op([weights], scores * FP32)
    weights = tape.op([weights], scores * FP32, Back(saves_output=True))
    if shape.element_bytes != FP32:
        weights = tape.op([weights], n_bytes)
    out = tape.op([weights, value], value.n_bytes, Back([weights, value], gives_views=True))
    del weights, value
    return tape.op([out], out.n_bytes)


def _mlp(tape: Tape, x: Sized, shape: Shape) -> Sized:
    if 0 < shape.tile_tokens < shape.tokens:
        return _tiled_mlp(tape, x, shape)
    inner = [linear(tape, x, layer, shape) for layer in shape.mlp_in]
    wide = shape.tokens * shape.mlp_out.n_in * shape.element_bytes
    if len(inner) == 1:
        inner = [tape.op(inner, wide, is_view=True) for _ in range(2)]
    gate, up = inner
    active = tape.op([gate], wide, Back([gate]))
    del gate
    active = tape.op([active, up], wide, Back([active, up]))
    del up, inner
    return linear(tape, active, shape.mlp_out, shape, is_last=True)


def _tiled_mlp(tape: Tape, x: Sized, shape: Shape) -> Sized:
    """The MLP over a tile of tokens at a time, checkpointed (see `tiled_mlp.py`); the tiles are joined by a copy."""
    style = replace(shape.style, norms_out=False)
    tile = replace(shape, rows=1, length=shape.tile_tokens, tile_tokens=0, checkpointed=True, style=style)
    forward, backward = Tape(keeps_saved=False), Tape()
    _mlp(forward, forward.elsewhere(tile.hidden_bytes, needs_grad=True), tile)
    early = backward.new(tile.early_bytes)
    end = _mlp(backward, backward.elsewhere(tile.hidden_bytes, needs_grad=True), tile).node
    del early
    backward.backward(end, backward.elsewhere(tile.hidden_bytes))
    # Autograd collects what all tiles give to one adapter before it adds that to the adapter's gradient.
    gathered = sum(each.rank * (each.n_in + each.n_out) * FP32 for each in (*shape.mlp_in, shape.mlp_out))
    back = Back([x], temporary=max(x.n_bytes, backward.peak_bytes) + gathered)
    return tape.op([x], x.n_bytes, back, temporary=max(x.n_bytes, forward.peak_bytes))


def _add(tape: Tape, residual: Sized, x: Sized, shape: Shape) -> Sized:
    if shape.style.scales_residual:
        x = tape.op([x], x.n_bytes)
    return tape.op([residual, x], residual.n_bytes, PASSES_ON)
