"""Models as pure functions: init, apply, logits, token_logp; loading, saving and sampling."""

from .config import ModelConfig as ModelConfig
from .hf import save_hf as save_hf
from .pretrained import load as load
from .transformer import apply as apply
from .transformer import init as init
from .transformer import logits as logits
from .transformer import token_logp as token_logp
