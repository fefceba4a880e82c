"""LLaVA-STF for vLLM, which finds `register` by its entry point vllm.general_plugins where this package is."""

from ..core.register import families

TESTED = "0.32"  # .ci/vllm.txt


def register() -> None:
    """Tell vLLM's model registry. Never raises: every vLLM process on a machine calls it, whatever it serves."""
    from vllm import __version__
    from vllm.logger import init_logger

    # A name below vllm's: its handlers show no other.
    logger = init_logger("vllm.plugins.llava_stf")
    advice = f'stf-kernels was tested with vLLM {TESTED}, this is {__version__}: pip install "vllm=={TESTED}.*"'
    try:
        from vllm import ModelRegistry

        for family in families():
            name = family.generator.__name__
            ModelRegistry.register_model(name, f"{__name__}.model:{name}")
    except Exception as error:
        logger.warning("LLaVA-STF cannot be served (%s); %s", error, advice)
        return
    if __version__.split(".")[:2] != TESTED.split("."):
        logger.warning("LLaVA-STF may not work; %s", advice)
