r"""A model made from its configuration, saved as ``config.json`` and
``model.safetensors``, found again by name.

Book: :ref:`ch-crate-mae`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from crate_core.model.config import FrameConfig
from crate_core.model.files import (
    WEIGHTS_FILE,
    check_fit,
    load_weights,
    read_config,
    save_model,
)
from crate_core.model.hub import push_to_hub, resolve_directory

Model = TypeVar("Model", bound="SavedModel")


class SavedModel(nn.Module):
    """What a model does with its configuration and files; subclasses say what it
    computes.

    Book: :ref:`ch-crate-mae`.
    """

    config_class: ClassVar[type[FrameConfig]] = FrameConfig
    config: FrameConfig

    @classmethod
    def from_preset(cls: type[Model], name: str, **overrides: Any) -> Model:
        """A freshly initialised model of a named size; fields of the configuration can
        be overridden.

        Raises ``ValueError`` for an unknown name or field, or sizes that do not fit.
        """
        return cls.from_config(cls.config_class.preset(name, **overrides))

    @classmethod
    def from_config(cls: type[Model], config: FrameConfig) -> Model:
        """A freshly initialised model; what subclasses construct themselves from."""
        return cls(config)  # type: ignore[call-arg]  # a subclass takes its configuration alone

    @classmethod
    def from_pretrained(cls: type[Model], name: str | Path) -> Model:
        """Load a model that :meth:`save_pretrained` wrote: a directory, a bundled name
        or a Hugging Face Hub id.

        Weights stored in half precision are loaded into a model of single precision.

        Raises
        ------
        FileNotFoundError
            If it is none of these, or a file is missing.
        ValueError If the directory holds another architecture or the weights do not fit
            the configuration.
        """
        directory = resolve_directory(name)
        config = read_config(directory)
        found = config.get("model_type")
        if found != cls.config_class.model_type:
            raise ValueError(
                f"{directory} holds a model of type {found!r}, accepted: {cls.config_class.model_type!r}"
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

        ``options`` are those of :func:`crate_core.model.hub.push_to_hub`, such as
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
