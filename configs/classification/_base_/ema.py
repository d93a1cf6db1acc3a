# An option: add this file to `_base_` to test and save the averaged weights.
custom_hooks = [dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL')]
