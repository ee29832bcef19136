"""Command lines that import and export, and those that are refused."""

from typing import NamedTuple

BASE, ELASTIC = "--config=configs/base.py", "--config=tests/elastic.py"
# The elastic config on the network of the plain one: 16 tokens in 4 groups.
SPLIT = (
  ELASTIC,
  "--config.model.preset=SiT-tiny/2",
  "--config.elit.window=(2,2)",
  "--config.budgets=('k1','k4')",
)


class Case(NamedTuple):
  """A command line, and what its sentence holds; "{tmp}" is a folder of files."""

  argv: tuple[str, ...]
  holds: tuple[str, ...]


def take(
  source: str, *flags: str, config: tuple[str, ...] = (BASE,)
) -> tuple[str, ...]:
  source = source if "{" in source else f"{{tmp}}/{source}.safetensors"
  return (*config, "--mode=import", f"--source={source}", "--workdir={tmp}/new", *flags)


def give(target: str, *flags: str, workdir: str = "{run}") -> tuple[str, ...]:
  return (BASE, "--mode=export", f"--target={target}", f"--workdir={workdir}", *flags)


TARGET = "{tmp}/new.safetensors"
LATENT = (BASE, "--config.data.shape=(8,8,4)", "--config.data.vae=tiny")
WIDE = "--config.model.preset=SiT-digits/2"
CASES = {
  # The file.
  "no source": Case((BASE, "--mode=import", "--workdir={tmp}/new"), ("--source is",)),
  "no such file": Case(take("gone"), ("no such file", "gone.safetensors")),
  "a folder": Case(take("{tmp}"), ("a folder without a run", "file of weights")),
  "a folder like a file": Case(take("{tmp}/dir.safetensors"), ("without a run",)),
  "unknown suffix": Case(take("{tmp}/plain.bin"), ("'.bin'", ".safetensors or .pt")),
  "torch is not there": Case(take("{tmp}/x.pt"), ("elit_jax[torch]", ".safetensors")),
  "cut short": Case(take("short"), ("short.safetensors", "cut short or damaged")),
  "promises too much": Case(take("promise"), ("cut short or damaged", "fetch it")),
  "of something else": Case(take("else"), (" (4) and 10 more; unused", "lstm")),
  # Its tensors.
  "tensors missing": Case(
    take("missing"),
    ("missing tensors: blocks.{1,2}.attn.qkv.bias (2)", "y_embedder.embedding_table"),
  ),
  "tensors unused": Case(
    take("unused"), ("unused tensors: blocks.0.extra, head.bias (nearest",)
  ),
  "all at once": Case(
    take("all"),
    (
      "missing tensors: final_layer.linear.bias",
      "unused tensors: blocks.{4,5}.x (2)",
      "blocks.{0..3}.mlp.fc1.bias (4) has shape (127,), the model needs (128,)",
    ),
  ),  # fmt: skip
  "integers": Case(take("integers"), ("blocks.{0..3}.attn.qkv.weight (4)", "int8")),
  "eight bits": Case(take("float8"), ("float8_e4m3fn", "float16, bfloat16")),
  "not a number": Case(
    take("nan"), ("NaN or infinity: blocks.{0,3}.attn.proj.bias (2), t_embedder",)
  ),
  "infinite in float32": Case(take("large"), ("NaN or infinity: final_layer",)),
  "a projector not a number": Case(take("projector"), ("not finite", "projectors.0")),
  "a lone projector": Case(
    take("lone"), ("not whole: missing", ".bias (3), projectors.0.{0,2}.weight (2)")
  ),
  "graft of a lone projector": Case(
    take("lone", "--graft"), ("cannot be used: its projectors, numbered",)
  ),
  "projectors of another width": Case(
    take("wide_projectors"), ("projectors.0.0.weight has shape (8, 16)", "(8, 32)")
  ),
  "many tensors unused": Case(
    take("many"),
    (
      "part_a.weight, ",
      " and 16 more (near",
    ),
  ),
  "huge": Case(take("huge"), ("(1073741824, 32)", "y_embedder", "(11, 32)")),
  # Its network.
  "other positions": Case(
    take("positions"), ("'pos_embed' differs by up to 0.5", "4 x 4 tokens")
  ),
  "other classes": Case(
    take("plain", "--config.model.classes=1000"),
    ("classes 10, not 1000", "change the config, or take what fits by --graft"),
  ),
  "other resolution": Case(
    take("plain", "--config.data.shape=(16,16,1)"),
    ("pos_embed has shape (1, 16, 32)", "(1, 64, 32)"),
  ),
  "other size": Case(
    take("plain", WIDE), ("blocks 4, not 5, width 32, not 128 (change the config);",)
  ),
  "a learned variance": Case(
    take("variance"), ("output channels 2, not 1", "final_layer.linear.bias has shape")
  ),
  "QK-norm": Case(
    take("plain", "--config.model.qk_norm=head_ln"),
    ("QK-norm none, not head_ln", "blocks.{0..3}.attn.q_norm.weight (4)"),
  ),
  "a plain file, elastic": Case(
    take("plain", config=SPLIT),
    ("latents a group 0, not 4", "--graft", "missing tensors: input_token_editor"),
  ),
  "an elastic file, plain": Case(
    take("elit"), ("latents a group 4, not 0", "unused tensors: input_token_editor")
  ),
  # Grafts.
  "graft of another width": Case(
    take("plain", WIDE, "--graft"), ("nothing fits", "32 there and 128 here")
  ),
  "graft of half a file": Case(
    take("half", "--graft"), ("cannot be used", "missing tensors: blocks.{0..2}.attn")
  ),
  "graft of something else": Case(
    take("else", "--graft"), ("no DiT, SiT or ELIT-SiT", "x_embedder.proj.weight")
  ),
  "graft of other positions": Case(
    take("positions", "--graft"), ("'pos_embed' differs by up to 0.5",)
  ),
  "graft of flat positions": Case(
    take("flat_positions", "--graft"), ("'pos_embed' has shape (32,): want a table",)
  ),
  "graft without positions": Case(
    take("no_positions", "--graft"), ("no tensor 'pos_embed', a table (1, tokens,",)
  ),
  "graft of positions of nothing": Case(
    take("zero_positions", "--graft"), ("'pos_embed' has shape (1, 0, 32)",)
  ),
  "graft of no square of positions": Case(
    take("odd_positions", "--graft"), ("'pos_embed' has 7 rows, of no grid of 2",)
  ),
  "graft of too few latent positions": Case(
    take("few_latents", "--graft", config=SPLIT), ("7 latents", "are 5 positions")
  ),
  "a run that does not fit": Case(
    take("{run}", "--config.model.classes=7"),
    ("does not fit", "the null label's row", "--graft takes what fits"),
  ),
  "a run of other samples": Case(
    take("{latent}", *LATENT[1:-1]),
    ("does not fit: the samples: data.vae is 'tiny' there and '' here", "--graft"),
  ),
  # Folders and flags.
  "a workdir with a run": Case(
    (*take("plain")[:-1], "--workdir={run}"), ("has a run already", "a new one")
  ),
  "a workdir that is a file": Case(
    (*take("plain")[:-1], "--workdir={tmp}/plain.bin"), ("cannot write",)
  ),
  "graft is not a bool": Case(take("plain", "--graft=yep"), ("'yep'", "true or false")),
  "a target for an import": Case(
    take("plain", "--target=x"), ("--target", "--mode=export", "in --mode=import")
  ),
  "a dtype for an import": Case(
    take("plain", "--dtype=float16"), ("--dtype is a flag of --mode=export",)
  ),
  "a source for an export": Case(
    give(TARGET, "--source=x"), ("--source is a flag of --mode=import",)
  ),
  "a graft for an export": Case(give(TARGET, "--graft"), ("--graft is a flag of",)),
  "a source for training": Case(
    (BASE, "--mode=train", "--workdir={tmp}/new", "--source=x"),
    ("--source is a flag of --mode=import", "in --mode=train: leave it out"),
  ),
  "JSON of samples": Case(
    (BASE, "--mode=sample", "--workdir={tmp}/new", "--json"), ("--mode=describe",)
  ),
  "budgets of a training": Case(
    (BASE, "--workdir={tmp}/new", "--budgets=k1"), ("--budgets is a flag of",)
  ),
  "a mesh of other devices": Case(
    take("plain", "--config.mesh=(3,1,1)"), ("(3, 1, 1)", "there are 8")
  ),
  "no target": Case((*give("")[:2], "--workdir={run}"), ("--target is missing",)),
  "a target that is there": Case(
    give("{tmp}/plain.safetensors"), ("plain.safetensors is there already",)
  ),
  "a target of unknown kind": Case(give("{tmp}/new.ckpt"), ("'.ckpt'", ".pt")),
  "a target below a file": Case(
    give("{tmp}/plain.bin/new.safetensors"), ("cannot write", "plain.bin")
  ),
  "a target for torch": Case(give("{tmp}/new.pt"), ("elit_jax[torch]",)),
  "an unknown dtype": Case(give(TARGET, "--dtype=half"), ("'half'", "float16")),
  "nothing to export": Case(give(TARGET, workdir="{tmp}/new"), ("no checkpoint",)),
  "export of another model": Case(
    give(TARGET, "--config.model.classes=7"), ("another model", "was 10, is 7")
  ),
  "no such average": Case(give(TARGET, "--config.sample.ema=0.5"), ("'0.5'",)),
}
