"""A model as a folder, here or on the Hugging Face hub."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import ModelCard, ModelHubMixin

from segheads.card import model_card
from segheads.card.card import card_or_warning, save_card
from segheads.hub import UPLOAD, check_name, upload
from segheads.saving import describing, find_folder, restore_settings, write_folder
from segheads.untrusted import no_more_than
from segheads.weights_file import load_weights

if TYPE_CHECKING:
    from segheads.model import SegmentationModel

log = logging.getLogger(__name__)


class HubMixin(ModelHubMixin):
    """What `SegmentationModel` can do with a folder and with the hub."""

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,  # noqa: ARG002 (huggingface_hub's; config.json is ours)
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_kwargs: Any,
    ) -> str | None:
        """Write config.json, model.safetensors and a model card; each file is whole, or as it was before.

        A card that was edited is kept, and one that cannot be made is a warning.

        Args:
            save_directory: The folder; made if need be.
            config: Not used.
            repo_id: Name on the hub; None means the folder's.
            push_to_hub: Upload it, too.
            model_card_kwargs: Further fields of the card's front matter, such as `{"license": "mit"}`.
            **push_kwargs: Options of `push_to_hub`.

        Returns:
            What `push_to_hub` gives, or None.

        Raises:
            ValueError: If the model was assembled from parts, or its options are no JSON values or such as
                `from_pretrained` refuses.
            SavedModelError: If a weight is NaN or infinite.
        """
        model = cast("SegmentationModel", self)
        if model.plan is None:
            raise ValueError(
                "save_pretrained needs a model from create_model, which can be rebuilt from its arguments; this one "
                "was assembled from parts, so save its state_dict() and assemble it again"
            )
        folder = Path(save_directory)
        write_folder(folder, model, model.plan, model.data_config, model.classes, model.protocol, model.label_map)
        with card_or_warning(folder):
            save_card(self.generate_model_card(**(model_card_kwargs or {})), folder)
        if push_to_hub:
            return self.push_to_hub(repo_id=repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_kwargs)
        return None

    def generate_model_card(self, **metadata: Any) -> ModelCard:
        """The card that `save_pretrained` writes: parts, classes, limits, terms; `segheads push` adds what a run left.

        Args:
            **metadata: Further fields of its front matter, such as `license="mit"`.
        """
        return model_card(cast("SegmentationModel", self), **metadata)

    def push_to_hub(  # type: ignore[override]  # a model is its own files, of which none is left out
        self,
        repo_id: str,
        *,
        commit_message: str = UPLOAD,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool = False,
        new_card: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Upload the model to the Hugging Face hub, in one commit; `segheads push` uploads a run with its scores.

        Args:
            repo_id: `OWNER/NAME`, or `NAME` in the account of the token; made if need be.
            commit_message: Of the commit.
            private: Whether a new repository is private; None leaves that to the account's settings.
            token: Of the hub; None takes that of `hf auth login` or HF_TOKEN.
            branch: To commit to, made if need be; None means main.
            create_pr: Open a pull request instead.
            new_card: Replace a card that was edited on the hub, too, which is kept else.
            model_card_kwargs: Further fields of the card's front matter, such as `{"license": "mit"}`.

        Returns:
            The address of the commit, with huggingface_hub's attributes `oid` and `pr_url`.

        Raises:
            ValueError: As `save_pretrained` does, if the name is none (an `OptionError`), or if `private` is asked of a
                repository that is public.
            SavedModelError: If a weight is NaN or infinite.
            HubError: If there is no token, the hub is out of reach, or refuses; nothing was committed then.
        """
        options: dict[str, Any] = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        check_name(repo_id)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            files = {path.name: path for path in Path(folder).iterdir()}
            options |= {"new_card": new_card, "metadata": model_card_kwargs}
            return upload(files, repo_id, message=commit_message, **options)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the mixin takes any keyword in silence
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        num_classes: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> "SegmentationModel":
        """Load what `save_pretrained` or `push_to_hub` wrote; the model comes back in evaluation mode, on the CPU.

        Args:
            pretrained_model_name_or_path: A local folder, or a model's name on the Hugging Face hub, `OWNER/NAME` or
                `OWNER/NAME@REVISION`. Neither is trusted: no code of it runs, config.json is checked entry by entry
                before anything is built, and nothing that it names is opened or fetched.
            num_classes: Another number of classes than the saved model's: what depends on it is new and random, which
                a warning in the log lists, and the model has no class names. 1 is one class and its background, for
                which cross-entropy is that of a sigmoid. None keeps the saved one's.
            revision: Branch, tag or commit on the hub.
            token: Of the hub, for a private model.
            cache_dir: Where downloads are kept.
            force_download: Download what the cache holds, too.
            local_files_only: Ask the cache alone.

        Raises:
            SavedModelMissingError: If the folder lacks one of the files, or there is neither such a folder nor, as
                far as can be told, such a model on the hub.
            SavedModelError: If config.json is damaged, sets what is no setting of a part, or the weights do not fit,
                or are NaN or infinite.
            ValueError: If `num_classes` is below 1.
        """
        options: dict[str, Any] = {"local_files_only": local_files_only, "force_download": force_download}
        options |= {"revision": revision, "token": token, "cache_dir": cache_dir}
        saved = find_folder(str(pretrained_model_name_or_path), **options)
        plan = saved.plan if num_classes is None else saved.plan.with_classes(num_classes)
        with describing(saved.config), no_more_than(saved.weights):
            model = cast("type[SegmentationModel]", cls).from_plan(plan)
            new = [] if plan.num_classes == saved.plan.num_classes else model.weights_of_classes()
        if not new:
            load_weights(model, saved.weights)
            model.classes, model.label_map = saved.classes, saved.label_map
        else:
            load_weights(model, saved.weights, new=new)
            log.warning(
                f"{pretrained_model_name_or_path} has {saved.plan.num_classes} classes; new and random for "
                f"{num_classes}: {', '.join(new)}"
            )
        restore_settings(model, saved.settings, saved.config)
        model.protocol = saved.protocol
        with describing(saved.config):
            model.set_input(**saved.input)
        model.revision = saved.revision
        return model.eval()
