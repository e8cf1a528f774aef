// The operators that move rows: vlsp_replace_rows and vlsp_add_rows with their gradients, vlsp_add_rows_ in
// place and vlsp_add_rows_back, its gradient.
//
// A gradient needs the number of feature rows and their type, not their values: to keep those would hold
// their memory until the backward pass. The type is the attribute feature_type. The number, which may be
// unknown while a graph is built, is the height of the input like_features [N, 0].

#include "grad_mode.h"
#include "huge_pages.h"
#include "paddle_op.h"
#include "rows.h"
#include "unshared.h"

namespace vlsp {
namespace {

// In the order of ElementType, which is also what the attribute feature_type means.
constexpr DataType kElementTypes[] = {DataType::FLOAT32, DataType::FLOAT64, DataType::FLOAT16,
                                      DataType::BFLOAT16};

ElementType element_type(DataType type) {
  for (int i = 0; i < 4; ++i) {
    if (kElementTypes[i] == type) return static_cast<ElementType>(i);
  }
  PD_THROW("paddle_vl_sp: rows must be float32, float64, float16 or bfloat16");
}

DataType data_type(int feature_type) {
  PD_CHECK(0 <= feature_type && feature_type < 4, "paddle_vl_sp: unknown element type ", feature_type);
  return kElementTypes[feature_type];
}

// [N, H] for rows [.., H]
Shape feature_shape(const Shape& rows, const Shape& like_features) {
  PD_CHECK(!rows.empty() && !like_features.empty(),
           "paddle_vl_sp: rows must be [.., H], like_features [N, 0]");
  return {like_features[0], rows.back()};
}

// ---- kernels ----

// One kernel of rows.h in both forms.
template <class... Args>
struct Kernel {
  const char* name;
  void (*cpu)(const Args&...);
  int (*cuda)(const Args&..., void* stream);

  // On the device of `x`.
  void launch(const Tensor& x, const Args&... args) const {
    if (!x.is_gpu()) return cpu(args...);
#ifdef VLSP_WITH_CUDA
    check_cuda(cuda(args..., DeviceOf(x).stream()), name);
#else
    refuse_gpu(name);
#endif
  }
};

#ifdef VLSP_WITH_CUDA
#define VLSP_KERNEL(name) {#name, name##_cpu, name##_cuda}
#else
#define VLSP_KERNEL(name) {#name, name##_cpu, nullptr}
#endif
using MergeKernel = Kernel<Rows, ConstRows, ConstRows, Pairs, RowShape, Map>;
constexpr MergeKernel kReplaceRows = VLSP_KERNEL(replace_rows);
constexpr MergeKernel kAddRows = VLSP_KERNEL(add_rows);
constexpr Kernel<Rows, ConstRows, Pairs, RowShape, Map> kZeroRows = VLSP_KERNEL(zero_rows);
constexpr Kernel<Rows, ConstRows, Pairs, RowShape> kAddRowsInPlace = VLSP_KERNEL(add_rows_in_place);
constexpr Kernel<Rows, ConstRows, Pairs, RowShape> kTakeRows = VLSP_KERNEL(take_rows);

Rows written(Tensor& x) { return {x.data(), element_type(x.dtype())}; }

ConstRows read(const Tensor& x) { return {x.data(), element_type(x.dtype())}; }

struct Where {
  Pairs pairs;
  RowShape shape;
};

Where check(const Tensor& hidden, const Tensor& features, const Tensor& update, const Tensor& gather) {
  PD_CHECK(
      !hidden.shape().empty() && features.shape().size() == 2 && hidden.shape().back() == features.shape()[1],
      "paddle_vl_sp: hidden must be [.., H] and features [N, H], got ", text(hidden.shape()), " and ",
      text(features.shape()));
  PD_CHECK(hidden.place() == features.place() && hidden.place() == update.place() &&
               hidden.place() == gather.place(),
           "paddle_vl_sp: hidden, features and indices must be on one device");
  PD_CHECK(update.dtype() == DataType::INT64 && gather.dtype() == DataType::INT64 &&
               update.numel() == gather.numel(),
           "paddle_vl_sp: update and gather indices must be int64 and of one length");
  const int64_t width = features.shape()[1];
  return {{update.data<int64_t>(), gather.data<int64_t>(), update.numel()},
          {width ? hidden.numel() / width : 0, features.shape()[0], width}};
}

// All of which a kernel will write.
Tensor empty_rows(const Shape& shape, DataType type, const paddle::Place& place) {
  Tensor rows = paddle::empty(shape, type, place);
  if (rows.is_cpu()) ask_for_huge_pages(rows.data(), rows.numel() * phi::SizeOf(type));
  return rows;
}

Tensor empty_rows_like(const Tensor& x) { return empty_rows(x.shape(), x.dtype(), x.place()); }

// Memory for a Map.
Tensor empty_map(const RowShape& shape, const paddle::Place& place) {
  return paddle::empty({shape.num_rows}, DataType::INT64, place);
}

// [N, H] with features[gather] = rows[update] and zero elsewhere: the gradient of using features.
Tensor take_rows(const Tensor& rows, const Tensor& update, const Tensor& gather, const Tensor& like_features,
                 int feature_type) {
  const Shape shape = feature_shape(rows.shape(), like_features.shape());
  Tensor features = empty_rows(shape, data_type(feature_type), rows.place());
  const Where where = check(rows, features, update, gather);
  kTakeRows.launch(rows, written(features), read(rows), where.pairs, where.shape);
  return features;
}

// ---- forward ----

template <const MergeKernel& kernel>
std::vector<Tensor> merge_rows(const Tensor& hidden,                        // [.., H]
                               const Tensor& features,                      // [N, H]
                               const Tensor& update, const Tensor& gather,  // [n]
                               const Tensor& like_features, int feature_type) {
  const Where where = check(hidden, features, update, gather);
  Tensor out = empty_rows_like(hidden);
  Tensor map = empty_map(where.shape, hidden.place());
  kernel.launch(hidden, written(out), read(hidden), read(features), where.pairs, where.shape,
                map.data<int64_t>());
  return {out};
}

// Its gradient is a PyLayer's, in Python: one of its own would leave `hidden` with its old graph.
void add_rows_inplace(Tensor& hidden, const Tensor& features, const Tensor& update, const Tensor& gather) {
  const Where where = check(hidden, features, update, gather);
  kAddRowsInPlace.launch(hidden, written(hidden), read(features), where.pairs, where.shape);
}

// The same for shapes and for types. It must not throw: the process would end while a graph is traced, whose
// inputs are checked in Python and when it runs.
template <class T>
std::vector<T> infer_out(const T& hidden, const T& features, const T& update, const T& gather,
                         const T& like_features, int feature_type) {
  return {hidden};
}

// ---- gradients ----

std::vector<Tensor> replace_rows_grad(const Tensor& update, const Tensor& gather, const Tensor& like_features,
                                      const Tensor& out_grad, int feature_type) {
  const Tensor feature_grad = take_rows(out_grad, update, gather, like_features, feature_type);
  const Where where = check(out_grad, feature_grad, update, gather);
  Tensor hidden_grad = empty_rows_like(out_grad);
  Tensor map = empty_map(where.shape, out_grad.place());
  kZeroRows.launch(out_grad, written(hidden_grad), read(out_grad), where.pairs, where.shape,
                   map.data<int64_t>());
  return {hidden_grad, feature_grad};
}

Tensor copied(const Tensor& x) {
  if (x.is_gpu()) return x.copy_to(x.place(), false);
  Tensor copy = empty_rows_like(x);
  copy_rows_cpu(written(copy), read(x), {x.numel(), 0, 1});
  return copy;
}

// Autograd may add the gradients of other users of `hidden` into the tensor that is returned for it. So that
// is out_grad itself only where nothing else refers to it.
std::vector<Tensor> add_rows_grad(const Tensor& update, const Tensor& gather, const Tensor& like_features,
                                  const Tensor& out_grad, int feature_type) {
  return {is_unshared(out_grad) ? out_grad : copied(out_grad),
          take_rows(out_grad, update, gather, like_features, feature_type)};
}

std::vector<Shape> infer_grad_shapes(const Shape& update, const Shape& gather, const Shape& like_features,
                                     const Shape& out_grad, int feature_type) {
  return {out_grad, feature_shape(out_grad, like_features)};
}

std::vector<DataType> infer_grad_types(const DataType& update, const DataType& gather,
                                       const DataType& like_features, const DataType& out_grad,
                                       int feature_type) {
  return {out_grad, data_type(feature_type)};
}

// ---- gradients of gradients ----

// One of the two is missing where it was not asked for: then it is zero.
Tensor given_or_zeros(const Tensor& x, const Shape& shape, DataType type, const paddle::Place& place) {
  return x.initialized() ? x : paddle::full(shape, 0, type, place);
}

// Both operations are linear: the gradient of their gradient moves rows as they do themselves.
template <const MergeKernel& kernel>
std::vector<Tensor> merge_rows_double_grad(const Tensor& update, const Tensor& gather,
                                           const Tensor& like_features, const Tensor& out_grad,
                                           const Tensor& hidden_grad_grad, const Tensor& feature_grad_grad,
                                           int feature_type) {
  PD_CHECK(!is_recorded(hidden_grad_grad) && !is_recorded(feature_grad_grad),
           "paddle_vl_sp: replace_rows and add_rows have no third gradient: leave create_graph out of the "
           "second, or keep them out of what is differentiated three times");
  const Shape hidden_shape = out_grad.shape();
  const Tensor hidden = given_or_zeros(hidden_grad_grad, hidden_shape, out_grad.dtype(), out_grad.place());
  const Tensor features =
      given_or_zeros(feature_grad_grad, feature_shape(hidden_shape, like_features.shape()),
                     data_type(feature_type), out_grad.place());
  return merge_rows<kernel>(hidden, features, update, gather, like_features, feature_type);
}

template <class T>
std::vector<T> infer_double_grad(const T& update, const T& gather, const T& like_features, const T& out_grad,
                                 const T& hidden_grad_grad, const T& feature_grad_grad, int feature_type) {
  return {out_grad};
}

}  // namespace
}  // namespace vlsp

#define VLSP_BUILD_ROW_OP(op, kernel, grad)                                                   \
  PD_BUILD_OP(op)                                                                             \
      .Inputs({"hidden", "features", "update", "gather", "like_features"})                    \
      .Outputs({"out"})                                                                       \
      .Attrs({"feature_type: int"})                                                           \
      .SetKernelFn(PD_KERNEL(vlsp::merge_rows<kernel>))                                       \
      .SetInferShapeFn(PD_INFER_SHAPE(vlsp::infer_out<vlsp::Shape>))                          \
      .SetInferDtypeFn(PD_INFER_DTYPE(vlsp::infer_out<vlsp::DataType>));                      \
  PD_BUILD_GRAD_OP(op)                                                                        \
      .Inputs({"update", "gather", "like_features", paddle::Grad("out")})                     \
      .Outputs({paddle::Grad("hidden"), paddle::Grad("features")})                            \
      .Attrs({"feature_type: int"})                                                           \
      .SetKernelFn(PD_KERNEL(grad))                                                           \
      .SetInferShapeFn(PD_INFER_SHAPE(vlsp::infer_grad_shapes))                               \
      .SetInferDtypeFn(PD_INFER_DTYPE(vlsp::infer_grad_types));                               \
  PD_BUILD_DOUBLE_GRAD_OP(op)                                                                 \
      .Inputs({"update", "gather", "like_features", paddle::Grad("out"),                      \
               paddle::Grad(paddle::Grad("hidden")), paddle::Grad(paddle::Grad("features"))}) \
      .Outputs({paddle::Grad(paddle::Grad("out"))})                                           \
      .Attrs({"feature_type: int"})                                                           \
      .SetKernelFn(PD_KERNEL(vlsp::merge_rows_double_grad<kernel>))                           \
      .SetInferShapeFn(PD_INFER_SHAPE(vlsp::infer_double_grad<vlsp::Shape>))                  \
      .SetInferDtypeFn(PD_INFER_DTYPE(vlsp::infer_double_grad<vlsp::DataType>))

VLSP_BUILD_ROW_OP(vlsp_replace_rows, vlsp::kReplaceRows, vlsp::replace_rows_grad);
VLSP_BUILD_ROW_OP(vlsp_add_rows, vlsp::kAddRows, vlsp::add_rows_grad);

PD_BUILD_OP(vlsp_add_rows_)
    .Inputs({"hidden", "features", "update", "gather"})
    .Outputs({"out"})
    .SetInplaceMap({{"hidden", "out"}})
    .SetKernelFn(PD_KERNEL(vlsp::add_rows_inplace));

PD_BUILD_OP(vlsp_add_rows_back)
    .Inputs({"update", "gather", "like_features", "out_grad"})
    .Outputs({"hidden_grad", "feature_grad"})
    .Attrs({"feature_type: int"})
    .SetKernelFn(PD_KERNEL(vlsp::add_rows_grad))
    .SetInferShapeFn(PD_INFER_SHAPE(vlsp::infer_grad_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(vlsp::infer_grad_types));
