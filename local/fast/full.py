"""The fast path on a whole track: layer by layer, each over all tiles of frames."""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import Tensor

from local.fast.packed import product_dtype
from local.fast.rows import RowBlock, RowModel, tile_size
from local.tasnet import ConvTasNetStereo


def separate_full(
    model: ConvTasNetStereo, mixture: Tensor, progress: Callable[[int], object]
) -> Iterator[Tensor]:
    """Separates a track as the model does; gLN, which averages over the whole track, included.

    Two tensors have the length of the track: the residual, and a buffer for the hidden channels of
    a block. The block's update of the residual overwrites rows of the buffer that are not needed
    any more.

    Args:
        progress: called with the number of samples just finished.

    Shape:
        - mixture: (audio_channels, T)
        - estimates: (C, audio_channels, T') each; in all, T samples
    """
    rows, like, time = RowModel(model), next(model.parameters()), mixture.shape[-1]
    frames, size = rows.count_frames(time), tile_size(like.device)
    if frames == 0:
        progress(time)
        yield mixture.new_zeros(model.C, *mixture.shape)
        return
    tiles = [slice(start, min(start + size, frames)) for start in range(0, frames, size)]
    spans = [slice(t.start * rows.hop, (t.stop - 1) * rows.hop + rows.length) for t in tiles]
    residual = like.new_zeros(frames, rows.B)
    buffer = like.new_empty(frames, max(rows.B, rows.H), dtype=product_dtype(like))
    hidden, update = buffer[:, : rows.H], buffer[:, : rows.B]

    for tile, span in zip(tiles, spans, strict=True):
        update[tile] = rows.bottleneck(rows.encode(mixture[:, span].to(like)))
    layer = rows.bottleneck
    for number, block in enumerate(rows.blocks):
        for tile in tiles:
            layer.add_to(residual[tile], update[tile])
            hidden[tile] = block.expand(residual[tile])
        done = 0
        for new in _updates(block, hidden, tiles):
            update[done : done + len(new)] = new
            done += len(new)
        layer = block
        progress(time * (number + 1) // len(rows.blocks) - time * number // len(rows.blocks))

    tail = mixture.new_zeros(model.C, len(mixture), rows.length - rows.hop)
    for tile, span in zip(tiles, spans, strict=True):
        layer.add_to(residual[tile], update[tile])
        weights = rows.encode(mixture[:, span].to(like))
        estimates = rows.decode(weights, residual[tile]).to(mixture)
        estimates[..., : tail.shape[-1]] += tail
        final = (tile.stop - tile.start) * rows.hop
        tail = estimates[..., final:]
        yield estimates[..., :final]
    yield F.pad(tail, (0, time - spans[-1].stop))  # samples after the last whole frame are zeros


def _updates(block: RowBlock, hidden: Tensor, tiles: list[slice]) -> Iterator[Tensor]:
    for tile in tiles:
        yield block.project(hidden[tile])
    yield block.finish()
