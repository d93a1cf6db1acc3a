_base_ = './detection_onnxruntime_dynamic.py'
# Not run here.
smallest, usual, largest = [1, 3, 320, 320], [1, 3, 800, 1344], [1, 3, 1344, 1344]
shapes = dict(min_shape=smallest, opt_shape=usual, max_shape=largest)
backend_config = dict(
    type='tensorrt',
    common_config=dict(fp16_mode=True, max_workspace_size=1 << 30),
    model_inputs=[dict(input_shapes=dict(input=shapes))],
)
