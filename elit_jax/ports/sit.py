"""Names of DiT, SiT and ELIT-SiT checkpoints (their PyTorch state dicts)."""

from elit_jax.models.spec import Blocks, Model, Read, Tap, Write, names
from elit_jax.ports.tables import Entry, linear, vector

# The fixed sine-cosine table stands in every checkpoint; ours is computed.
POSITION_TABLE = "pos_embed"


def table(model: Model) -> list[Entry]:
  """Every tensor of a SiT or ELIT-SiT checkpoint but the fixed position table."""
  rows = [
    Entry("x_embedder.proj.weight", ("patch", "kernel"), kind="conv"),
    vector("x_embedder.proj.bias", ("patch", "bias")),
    *linear("t_embedder.mlp.0", ("time", "fc1")),
    *linear("t_embedder.mlp.2", ("time", "fc2")),
    Entry("y_embedder.embedding_table.weight", ("label", "table")),
    *linear("final_layer.linear", ("unembed", "linear")),
    *linear("final_layer.adaLN_modulation.1", ("unembed", "modulation", "linear")),
  ]
  first = 0
  for name, stage in zip(names(model.trunk), model.trunk, strict=True):
    match stage:
      case Blocks():
        for layer in range(stage.count):
          rows += _block(f"blocks.{first + layer}", name, layer, stage.qk_norm)
        first += stage.count
      case Read():
        rows += _read("input_token_editor.adapters.0", name)
      case Write():
        rows += _write("output_token_editor.adapters.0", name, stage.depth)
      case Tap():
        for i in range(len(stage.features)):
          for theirs, ours in ((0, "fc1"), (2, "fc2"), (4, "fc3")):
            path = (name, f"projector_{i}", ours)
            rows += linear(f"projectors.{i}.{theirs}", path)
  return rows


def _block(theirs: str, ours: str, layer: int, qk_norm: bool) -> list[Entry]:
  rows = [
    *linear(f"{theirs}.attn.qkv", (ours, "attn", "qkv"), layer),
    *linear(f"{theirs}.attn.proj", (ours, "attn", "out"), layer),
    *linear(f"{theirs}.mlp.fc1", (ours, "mlp", "fc1"), layer),
    *linear(f"{theirs}.mlp.fc2", (ours, "mlp", "fc2"), layer),
    *linear(f"{theirs}.adaLN_modulation.1", (ours, "modulation", "linear"), layer),
  ]
  for norm in ("q_norm", "k_norm") if qk_norm else ():
    path = (ours, "attn", norm)
    rows.append(vector(f"{theirs}.attn.{norm}.weight", (*path, "scale"), layer))
    rows.append(vector(f"{theirs}.attn.{norm}.bias", (*path, "bias"), layer))
  return rows


def _cross_attention(theirs: str, path: tuple[str, ...]) -> list[Entry]:
  return [
    *linear(f"{theirs}.q_proj", (*path, "q")),
    *linear(f"{theirs}.kv_proj", (*path, "kv")),
    *linear(f"{theirs}.proj", (*path, "out")),
    vector(f"{theirs}.q_norm.scale", (*path, "q_norm")),
    vector(f"{theirs}.k_norm.scale", (*path, "k_norm")),
  ]


def _feed_forward(theirs: str, path: tuple[str, ...]) -> list[Entry]:
  return [
    Entry(f"{theirs}.{fc}.weight", (*path, fc, "kernel"), kind="linear")
    for fc in ("fc1", "fc2")
  ]


def _read(theirs: str, ours: str) -> list[Entry]:
  fit = f"{theirs}.fit_layer"
  return [
    Entry(f"{theirs}.learned_query_embed", (ours, "query")),
    Entry(f"{theirs}.pos_embed", (ours, "slot_position")),
    Entry(f"{theirs}.latent_pos_embed", (ours, "latent_position")),
    *linear(f"{fit}.adaLN_modulation.1", (ours, "modulation", "linear")),
    *_cross_attention(f"{fit}.latents_attend_to_patches.0", (ours, "attn")),
    *_feed_forward(f"{fit}.read_ff.0", (ours, "mlp")),
  ]


def _write(theirs: str, ours: str, depth: int) -> list[Entry]:
  rows = [Entry(f"{theirs}.pos_embed", (ours, "slot_position"))]
  for i in range(depth):
    attn = f"{theirs}.patches_attend_to_latents.{i}"
    rows += _cross_attention(attn, (ours, f"attn_{i}"))
    rows += _feed_forward(f"{theirs}.write_ff.{i}", (ours, f"mlp_{i}"))
  return rows
