"""The transformers auto class of a checkpoint, from the architecture in its config.json.

Most are `AutoModelForCausalLM`; classifiers, encoder-decoders, embedding models and vision-language models get their
own class, so that they can be quantized, saved and used like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TABLES = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "AutoModelForSeq2SeqLM",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "AutoModelForImageTextToText",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "AutoModelForMultimodalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AutoModelForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "AutoModelForQuestionAnswering",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "AutoModelForMultipleChoice",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "AutoModelForMaskedLM",
    "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES": "AutoModelForNextSentencePrediction",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "AutoModelForSpeechSeq2Seq",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": "AutoModelForPreTraining",
    "MODEL_MAPPING_NAMES": "AutoModel",
}
"""Mapping tables of transformers (model type → architectures) → auto class; the first match is used."""


def auto_class(config: Mapping[str, Any]) -> Any:
    """The auto class for a config.json: by its first architecture, else `AutoModelForCausalLM`.

    A bare decoder whose head is tied to its embeddings is opened with the head. Where no auto class has the model type,
    it is the transformers class of the architecture's name.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind, named = config.get("model_type"), config.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if not isinstance(kind, str) or config.get("auto_map"):
        return transformers.AutoModelForCausalLM
    for table, auto in _TABLES.items():
        known = getattr(modeling_auto, table, {}).get(kind, ())
        if architecture in ((known,) if isinstance(known, str) else known) and hasattr(transformers, auto):
            if auto == "AutoModel" and _has_tied_head(config, modeling_auto):
                break
            return getattr(transformers, auto)
    if kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # a component of a model, saved by itself
        named_class = getattr(transformers, str(architecture), None)
        if isinstance(named_class, type) and issubclass(named_class, transformers.PreTrainedModel):
            return named_class
    return transformers.AutoModelForCausalLM


def _has_tied_head(config: Mapping[str, Any], tables: Any) -> bool:
    kind = config.get("model_type")
    decoder = kind in tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(decoder and config.get("tie_word_embeddings"))
