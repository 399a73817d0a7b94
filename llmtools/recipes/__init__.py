"""The commands, each a function of a frozen dataclass of options.

`quantize`, `finetune`, `evaluate`, `generate`, `export`, `push`, `estimate`, `check`, `listing` and `env`: the options'
docstrings are the help of the command line, a YAML holds the dataclass's fields, and the result is printed as text or
JSON. These modules import nothing heavy at the top, so that help is quick; the functions import what they use. (Nor
under ``if TYPE_CHECKING`` where options are declared: to resolve the annotations, jsonargparse runs those lines.)
"""
