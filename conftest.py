"""Gives pytest its --emulate option: pytest --emulate sm_90a tests/emulated"""

pytest_plugins = ["flash_attn_cute.emulator.pytest_plugin"]
