"""FlexiDiT on ImageNet: a trained DiT or SiT with patches of 4 x 4 besides 2 x 2.

  R=--config=configs/flexidit.py:dit-xl-256
  python main.py $R --workdir=runs/flexi --mode=import --graft --source=dit.safetensors
  python main.py $R --workdir=runs/flexi --mode=train
  python main.py $R --workdir=runs/flexi --mode=sample
The argument is RUN[-lora] of RUN = dit | sit, b | xl, 256 | 512. Data are those of
configs/imagenet.py, which says how to prepare them; hardware as there, 0.62 of the
FLOPs a step. Without -lora all is trained, kernels are shared, and a size is drawn each
step (paper, sec. 3.1; AdamW 1e-4, batch 256; the paper names no number of steps: 40,000
is ours). -lora: the network stays as it is, and size 4 x 4 learns adapters of rank 32
from it (sec. 3.2, its recipe for text: AdamW 8e-4, weight decay 0.01, clip 0.02, batch
512). Sampled weak first, 64 % of the compute, CFG 1.5. We have made none of these runs.
"""

from ml_collections import ConfigDict

from configs import base, imagenet
from elit_jax.errors import lookup

RUNS = tuple(
  f"{name}-{size}-{pixels}{lora}"
  for name in ("dit", "sit")
  for size in ("b", "xl")
  for pixels in ("256", "512")
  for lora in ("", "-lora")
)


def get_config(run: str = "dit-xl-256") -> ConfigDict:
  """The config of a run, with its data in data/imagenet_<pixels>."""
  lookup(dict.fromkeys(RUNS), run, "run")
  config = imagenet.get_config(run.removesuffix("-lora"))
  config.flexi = base.flexi(("p4",))
  config.budgets = ("p2", "p4")
  config.train.steps = 40_000
  config.sample.steps = 250
  # The paper's 130/130 of 250.
  config.sample.plan = "120@p4 130@p2, cfg 1.5"
  if run.endswith("-lora"):
    config.flexi = base.flexi(("p4",), kernels="own", rank=32)
    config.budgets = ("p4",)
    config.optim.only = "^sizes/"
    config.flow.distill = "mse"
    config.optim.lr, config.optim.weight_decay, config.optim.clip = 8e-4, 0.01, 0.02
    config.train.batch_size = 512
  return config
