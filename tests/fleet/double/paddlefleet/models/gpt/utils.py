import paddle


def fill_feature(input_embeds, target_index, value):
    return paddle.where(target_index.unsqueeze(-1), paddle.full_like(input_embeds, value), input_embeds)
