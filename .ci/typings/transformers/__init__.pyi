"""What the type checker reads in place of transformers' own `__init__`.

That one imports all models of the library and took half of the checker's time. Classes that are
not named here are not checked.
"""

from typing import Any

from torch.nn import Module
from transformers.models.clip.configuration_clip import CLIPConfig as CLIPConfig
from transformers.models.clip.configuration_clip import CLIPTextConfig as CLIPTextConfig
from transformers.models.clip.configuration_clip import CLIPVisionConfig as CLIPVisionConfig
from transformers.models.convnext.configuration_convnext import ConvNextConfig as ConvNextConfig
from transformers.models.llama.configuration_llama import LlamaConfig as LlamaConfig
from transformers.models.resnet.configuration_resnet import ResNetConfig as ResNetConfig
from transformers.models.roberta.configuration_roberta import RobertaConfig as RobertaConfig
from transformers.models.vit.configuration_vit import ViTConfig as ViTConfig
from transformers.trainer import Trainer as Trainer
from transformers.trainer_callback import TrainerCallback as TrainerCallback
from transformers.trainer_callback import TrainerControl as TrainerControl
from transformers.trainer_callback import TrainerState as TrainerState
from transformers.trainer_utils import EvalPrediction as EvalPrediction
from transformers.training_args import TrainingArguments as TrainingArguments

class PreTrainedModel(Module):
    config: Any
    main_input_name: str
    def get_decoder(self) -> Module: ...

def __getattr__(name: str) -> Any: ...
