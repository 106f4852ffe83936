r"""A model made from its configuration, saved as ``config.json`` and
``model.safetensors``, found again by name: here,
in this package, or on the Hugging Face Hub.

``huggingface_hub`` is imported when it is used: a script that loads from a directory
does not need it.

Book: :ref:`ch-crate-mae`, :ref:`ch-evaluation`.
"""

import importlib.resources
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from crate_core.model.config import FrameConfig
from crate_core.model.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_fit,
    load_weights,
    read_config,
    save_model,
)

CARD = """---
{{ card_data }}
---

# {{ title }}

A masked autoencoder of type `{{ model_type }}`, written by `crate_core`; the file
`config.json` has its sizes:

| field | value |
|---|---|
{% for name, value in config.items() %}| {{ name }} | {{ value }} |
{% endfor %}

```python
from crate_core import load_model

model = load_model("{{ repo_id }}")
# (B, 1 + L, d), the class token first
features = model.forward_features(model.standardize(images))
```

What it was trained on, for how long and how well it does is not known to the code that
wrote this card; say it here.
"""
"""Template of the model card."""


def bundled_directory() -> Path:
    """Where the weights lie that are installed with the package."""
    return Path(str(importlib.resources.files("crate_core") / "weights"))


def bundled_names() -> list[str]:
    """Names of the models that are installed with the package."""
    return sorted(
        path.parent.name for path in bundled_directory().glob(f"*/{CONFIG_FILE}")
    )


def resolve_directory(name: str | Path) -> Path:
    """Where a saved model lies: a local directory as it is, a bundled name in the
    package, a Hugging Face Hub id (owner/name) downloaded.

    Raises ``FileNotFoundError`` naming the bundled models if it is none of these.
    """
    if not isinstance(name, str | Path):
        raise TypeError(
            "a model is loaded from a directory, a bundled name or a Hub id, "
            f"got {type(name).__name__}"
        )
    path = Path(name)
    if path.is_dir():
        return path
    bundled = bundled_names()
    if str(name) in bundled:
        return bundled_directory() / str(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"{name} is neither a directory of a saved model, nor a bundled model "
            f"({', '.join(bundled) or 'there are none'}), nor a Hub id of the form "
            "owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(name), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"no directory {name} here, and the Hub did not give a model of that "
            f"name: {error}"
        ) from error


def push_to_hub(
    save: Callable[[Path], None],
    config: Mapping[str, Any],
    repo_id: str,
    **options: Any,
) -> str:
    """Upload a model and a card to the Hub through huggingface_hub's ``ModelHubMixin``.

    Parameters
    ----------
    save : writes the model's files into a directory.
    config : fields for the card, with ``model_type``.
    repo_id : owner/name; created if it is not there.
    options : ``private``, ``token``, ``branch``, ``create_pr``, ``commit_message`` and
        the others of the mixin.

    Returns
    -------
    The address of the commit.

    Book: :ref:`ch-evaluation`.  Loading goes through :func:`resolve_directory`, not
    through the mixin.
    """
    from huggingface_hub import ModelHubMixin

    class Adapter(
        ModelHubMixin,
        library_name="crate-core",
        tags=["masked-autoencoder", str(config["model_type"])],
        pipeline_tag="image-feature-extraction",
        model_card_template=CARD,
    ):
        def _save_pretrained(self, save_directory: Path) -> None:
            save(save_directory)

    card = {
        "title": repo_id.rpartition("/")[2],
        "repo_id": repo_id,
        "model_type": config["model_type"],
        "config": {
            name: value for name, value in config.items() if name != "model_type"
        },
    }
    return Adapter().push_to_hub(repo_id, model_card_kwargs=card, **options)


Model = TypeVar("Model", bound="SavedModel")


class SavedModel(nn.Module):
    """What a model does with its configuration and files; subclasses say what it
    computes.

    Book: :ref:`ch-crate-mae`.
    """

    config_class: ClassVar[type[Any]] = FrameConfig
    config: Any

    @classmethod
    def check_config(cls, config: Any) -> None:
        """``TypeError`` unless the configuration is of this architecture."""
        if not isinstance(config, cls.config_class):
            raise TypeError(
                f"the configuration of a {cls.__name__} is a "
                f"{cls.config_class.__name__}, got {type(config).__name__}; "
                f"{cls.config_class.__name__}.from_dict reads a mapping"
            )

    @classmethod
    def from_preset(cls: type[Model], name: str, **overrides: Any) -> Model:
        """A freshly initialised model of a named size; fields of the configuration can
        be overridden.

        Raises ``ValueError`` for an unknown name or field, or sizes that do not fit.
        """
        return cls.from_config(cls.config_class.preset(name, **overrides))

    @classmethod
    def from_config(cls: type[Model], config: Any) -> Model:
        """A freshly initialised model; what subclasses construct themselves from."""
        return cls(config)

    @classmethod
    def from_pretrained(cls: type[Model], name: str | Path) -> Model:
        """Load a model that :meth:`save_pretrained` wrote: a directory, a bundled name
        or a Hugging Face Hub id.

        Weights stored in half precision are loaded into a model of single precision.

        Raises
        ------
        FileNotFoundError
            If it is none of these, or a file is missing.
        ValueError
            If the directory holds another architecture or the weights do not fit the
            configuration.
        """
        directory = resolve_directory(name)
        config = read_config(directory)
        found = config.get("model_type")
        if found != cls.config_class.model_type:
            raise ValueError(
                f"{directory} holds a model of type {found!r}, accepted: "
                f"{cls.config_class.model_type!r}"
            )
        model = cls.from_config(cls.config_class.from_dict(config))
        model.load_weights(
            load_weights(directory / WEIGHTS_FILE), source=str(directory)
        )
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into a directory, both whole
        or neither.

        Raises ``OSError`` if the disk is full or not writable; files already there are
        then untouched.
        """
        save_model(Path(directory), self.config.to_dict(), self.state_dict())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with a card to the Hugging Face Hub; returns the address of
        the commit.

        ``options`` are those of :func:`push_to_hub`, such as
        ``private`` and ``token``.
        """
        return push_to_hub(
            self.save_pretrained, self.config.to_dict(), repo_id, **options
        )

    def load_weights(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load a complete set of weights; ``ValueError`` names ``source`` and what does
        not fit, and loads nothing.
        """
        check_fit(self.state_dict(), weights, source)
        self.load_state_dict(dict(weights))
