import paddle


class FleetLayer(paddle.nn.Layer):
    def __init__(self, config):
        super().__init__()
        self.config = config
