"""Fine-tuning on a folder of your own images, one folder a class.

The argument is CLASSES[,256|512], 10 unless given. Four commands, the first two once:
  R=--config=configs/finetune.py:37
  python main.py $R --mode=prepare \\
    --config.prepare.source=my_images --config.prepare.weights=sd-vae-ft-mse.safetensors
  python main.py $R --workdir=runs/mine --mode=import --graft --source=sit.safetensors
  python main.py $R --workdir=runs/mine --mode=train
  python main.py $R --workdir=runs/mine --mode=sample \\
    --config.sample.decoder=sd-vae-ft-mse.safetensors --config.sample.budgets=100%,25%

`--graft` takes the blocks of a plain SiT-XL/2 or of an ELIT one, in any split, and
makes anew what other classes need: the rows of the label table, and Read and Write
where the file has none. Hardware: one GPU of 80 GB; 9.0 TFLOPs a step at batch 16, 0.1
H100-hours in all at 40 % of its public peak, assumed. Results: not run.
"""

from ml_collections import ConfigDict

from configs import elit_sit
from elit_jax.errors import ConfigError


def get_config(arg: str = "10") -> ConfigDict:
  """An ELIT-SiT-XL/2 of few classes, its data in data/finetune_<pixels>."""
  classes, _, pixels = arg.partition(",")
  pixels = pixels or "256"
  if not classes.isdecimal() or int(classes) < 1 or pixels not in ("256", "512"):
    raise ConfigError(
      f"config argument {arg!r}: want the number of your classes, such as 37 or 37,512"
    )
  config = elit_sit.get_config(f"XL/2,released,{pixels}")
  config.model.classes = int(classes)
  config.model.remat = "full"
  config.data.source = "shards"
  config.data.path = f"data/finetune_{pixels}"
  config.data.vae = "sd"
  config.data.dtype = "float16"
  config.prepare.flip = True  # few images: their mirror images are as good
  config.prepare.max_skipped = 10
  # Few budgets, so that each is seen often in a short run.
  full = 16 if pixels == "256" else 64
  config.budgets = (f"k{full // 4}", f"k{full // 2}", f"k{full}")
  config.train.steps = 20_000
  config.train.batch_size = 16
  config.optim.lr = 5e-5
  config.optim.warmup = 500
  config.optim.ema = ("0.999",)
  config.checkpoint.every = 1_000
  config.sample.steps = 50
  config.sample.count, config.sample.batch_size = 16, 16
  return config
