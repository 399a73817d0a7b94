"""What people come to do, each a function over a frozen dataclass of options.

`quantize`, `finetune`, `evaluate`, `generate`, `check`, `listing` and `env`: the options' docstrings are the help of
the command line, a YAML is the dataclass written down, and the result prints for people and converts to JSON. These
modules import nothing heavy at the top, so that help is quick; the functions import what they use. (Nor do they under
``if TYPE_CHECKING`` where options are declared: to read the annotations, jsonargparse runs those lines.)
"""
