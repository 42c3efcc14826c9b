"""The package to name in SGLANG_EXTERNAL_MODEL_PACKAGE: SGLang imports its modules and takes their `EntryClass`."""
