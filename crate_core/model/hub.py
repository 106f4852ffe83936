r"""Publishing a model on the Hugging Face Hub, and finding one there or in this
package.

``huggingface_hub`` is imported when it is used: a script that loads from a directory
does not need it.

Book: :ref:`ch-evaluation`.
"""

import importlib.resources
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from crate_core.model.files import CONFIG_FILE, WEIGHTS_FILE

CARD = """---
{{ card_data }}
---

# {{ title }}

A masked autoencoder of type `{{ model_type }}`, written by `crate_core`; the file `config.json` has its sizes:

| field | value |
|---|---|
{% for name, value in config.items() %}| {{ name }} | {{ value }} |
{% endfor %}

```python
from crate_core.model.build import load_model

model = load_model("{{ repo_id }}")
features = model.forward_features(model.standardize(images))  # (B, 1 + L, d), the class token first
```

What it was trained on, for how long and how well it does is not known to the code that wrote this card; say it here.
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
    path = Path(name)
    if path.is_dir():
        return path
    bundled = bundled_names()
    if str(name) in bundled:
        return bundled_directory() / str(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        raise FileNotFoundError(
            f"{name} is neither a directory of a saved model, nor a bundled model "
            f"({', '.join(bundled) or 'there are none'}), nor a Hub id of the form owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(str(name), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE])
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"no directory {name} here, and the Hub did not give a model of that name: {error}"
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
