_base_ = './instance-seg_onnxruntime_dynamic.py'
# Of one image of the size it is traced with.
onnx_config = dict(dynamic_axes=None)
