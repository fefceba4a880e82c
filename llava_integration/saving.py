"""Checkpoints under the names of the modules, which is what `load_state_dict` and a resumed Trainer look for.

transformers writes the names of a family's first checkpoints, language_model.model.* for a LLaVA; from_pretrained reads
both, but `Trainer.train(resume_from_checkpoint=...)` drops names that are no module's and goes on without the weights.
"""


class ModuleNames:
    """Mixin in front of a PreTrainedModel."""

    def save_pretrained(self, *args, save_original_format: bool = False, **kwargs):
        """As PreTrainedModel.save_pretrained; `save_original_format` is False unless asked for."""
        return super().save_pretrained(*args, save_original_format=save_original_format, **kwargs)
