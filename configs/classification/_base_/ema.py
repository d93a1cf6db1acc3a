# An option: add this file to `_base_` to test and save the averaged weights. The momentum falls
# from 1 as 100 / (100 + steps) to 1e-4: the average follows short trainings, too.
custom_hooks = [
    dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=1e-4, priority='ABOVE_NORMAL')
]
