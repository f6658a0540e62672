// Calls the core with tensors' addresses: unpacks them, releases the GIL, calls. logra_kernels.ops has
// checked sizes, types and devices; the core checks again what its memory accesses depend on.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "logra/covariance_update.h"
#include "logra/gradients.h"
#include "logra/isa.h"
#include "logra/limits.h"
#include "logra/pack_rows.h"
#include "logra/project.h"
#include "logra/scores.h"
#include "logra/self_influence.h"
#include "logra/topk_scores.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

// Address, dtype, shape and strides in elements: logra_kernels/ops/_pointers.py.
struct View {
  static constexpr std::size_t kMostAxes = 3;
  Address address = 0;
  int dtype = 0;
  std::size_t axes = 0;
  std::size_t shape[kMostAxes] = {}, strides[kMostAxes] = {};
};

}  // namespace

namespace pybind11::detail {

// Written by hand, because pybind11's casters of tuples and vectors take 0.4 us a tensor.
template <>
struct type_caster<View> {
  PYBIND11_TYPE_CASTER(View, const_name("tuple"));

  bool load(handle source, bool) {
    PyObject* const parts = source.ptr();
    if (!PyTuple_Check(parts) || PyTuple_GET_SIZE(parts) != 4) return false;
    value.address = static_cast<Address>(PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(parts, 0)));
    value.dtype = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(parts, 1)));
    PyObject *const shape = PyTuple_GET_ITEM(parts, 2), *const strides = PyTuple_GET_ITEM(parts, 3);
    if (!PyTuple_Check(shape) || !PyTuple_Check(strides)) return false;
    value.axes = static_cast<std::size_t>(PyTuple_GET_SIZE(shape));
    if (value.axes > View::kMostAxes || PyTuple_GET_SIZE(strides) != PyTuple_GET_SIZE(shape)) return false;
    for (std::size_t i = 0; i < value.axes; ++i) {
      value.shape[i] = PyLong_AsSize_t(PyTuple_GET_ITEM(shape, static_cast<Py_ssize_t>(i)));
      value.strides[i] = PyLong_AsSize_t(PyTuple_GET_ITEM(strides, static_cast<Py_ssize_t>(i)));
    }
    if (PyErr_Occurred() == nullptr) return true;
    PyErr_Clear();
    return false;
  }
};

}  // namespace pybind11::detail

namespace {

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void expect_axes(const View& view, std::size_t axes) {
  if (view.axes != axes) throw std::invalid_argument("a view with an unexpected number of axes");
}

logra::Matrix matrix(const View& view) {
  expect_axes(view, 2);
  return {pointer<const void>(view.address), static_cast<logra::Dtype>(view.dtype), view.shape[0],
          view.shape[1], view.strides[0]};
}

// [N, T, dim], or packed [T, dim]
logra::Tokens tokens(const View& view, bool packed) {
  expect_axes(view, packed ? 2 : 3);
  return {pointer<const void>(view.address), static_cast<logra::Dtype>(view.dtype), view.shape[view.axes - 1],
          packed ? 0 : view.strides[0], packed ? view.strides[0] : view.strides[1]};
}

logra::Examples examples(const View& x, Address mask, Address cu_seqlens, const View& out) {
  return {out.shape[0], x.shape[cu_seqlens == 0 ? 1 : 0], pointer<const std::uint8_t>(mask),
          pointer<const std::int64_t>(cu_seqlens)};
}

// Calls the core without the GIL. The arguments are made before it is released.
template <class Function, class... Arguments>
auto released(const Function& function, const Arguments&... arguments) {
  py::gil_scoped_release release;
  return function(arguments...);
}

void project(const View& x, const View& proj, Address out) {
  released(logra::project, matrix(x), matrix(proj), pointer<float>(out));
}

void projected_gradients(const View& x, const View& dy, const std::optional<View>& proj_in,
                         const std::optional<View>& proj_out, Address mask, Address cu_seqlens,
                         const View& out) {
  const bool packed = cu_seqlens != 0;
  logra::Matrix in, outer;
  if (proj_in) in = matrix(*proj_in);
  if (proj_out) outer = matrix(*proj_out);
  expect_axes(out, 3);
  released(logra::projected_gradients, examples(x, mask, cu_seqlens, out), tokens(x, packed),
           tokens(dy, packed), proj_in ? &in : nullptr, proj_out ? &outer : nullptr,
           pointer<float>(out.address));
}

void projected_coordinates(const View& x, const View& dy, const std::optional<View>& proj_in,
                           const std::optional<View>& proj_out, Address places, Address scale, Address mask,
                           Address cu_seqlens, const View& out) {
  const bool packed = cu_seqlens != 0;
  logra::Matrix in, outer;
  if (proj_in) in = matrix(*proj_in);
  if (proj_out) outer = matrix(*proj_out);
  expect_axes(out, 2);
  const logra::Coordinates coordinates = {out.shape[1], pointer<const std::int64_t>(places),
                                          pointer<const float>(scale)};
  released(logra::projected_coordinates, examples(x, mask, cu_seqlens, out), tokens(x, packed),
           tokens(dy, packed), proj_in ? &in : nullptr, proj_out ? &outer : nullptr, coordinates,
           pointer<float>(out.address), out.strides[0]);
}

void covariance_update(const View& cov, const View& rows) {
  const logra::Matrix rows_matrix = matrix(rows);
  py::gil_scoped_release release;
  if (static_cast<logra::Dtype>(cov.dtype) == logra::Dtype::kFloat64)
    logra::covariance_update(pointer<double>(cov.address), rows_matrix);
  else
    logra::covariance_update(pointer<float>(cov.address), rows_matrix);
}

void scores(const View& queries, const View& rows, Address row_scale, Address row_bias, Address out) {
  released(logra::scores, matrix(queries), matrix(rows), pointer<const float>(row_scale),
           pointer<const float>(row_bias), pointer<float>(out));
}

void topk_scores(const View& queries, const View& rows, std::size_t k, Address row_scale, Address row_bias,
                 std::int64_t row_offset, Address top_scores, Address top_ids, Address bottom_scores,
                 Address bottom_ids) {
  const logra::Extremes top = {pointer<float>(top_scores), pointer<std::int64_t>(top_ids)};
  const logra::Extremes bottom = {pointer<float>(bottom_scores), pointer<std::int64_t>(bottom_ids)};
  released(logra::topk_scores, matrix(queries), matrix(rows), pointer<const float>(row_scale),
           pointer<const float>(row_bias), k, row_offset, top, bottom);
}

// Of uint8, which logra::Dtype does not have, so the views' dtype is not looked at.
logra::Planes planes(const std::vector<View>& views, std::size_t cols, Address levels) {
  logra::Planes planes;
  planes.count = views.size();
  for (std::size_t p = 0; p < views.size() && p < logra::Planes::kMost; ++p) {
    expect_axes(views[p], 2);
    planes.data[p] = pointer<const std::uint8_t>(views[p].address);
    planes.row_strides[p] = views[p].strides[0];
    planes.rows = views[p].shape[0];
  }
  planes.cols = cols;
  planes.levels = pointer<const std::int8_t>(levels);
  return planes;
}

void plane_scores(const View& queries, const std::vector<View>& rows, Address levels, Address row_scale,
                  Address row_bias, Address out) {
  const logra::Matrix asked = matrix(queries);
  released(logra::plane_scores, asked, planes(rows, asked.cols, levels), pointer<const float>(row_scale),
           pointer<const float>(row_bias), pointer<float>(out));
}

void topk_plane_scores(const View& queries, const std::vector<View>& rows, Address levels, std::size_t k,
                       Address row_scale, Address row_bias, std::int64_t row_offset, Address top_scores,
                       Address top_ids, Address bottom_scores, Address bottom_ids) {
  const logra::Matrix asked = matrix(queries);
  const logra::Extremes top = {pointer<float>(top_scores), pointer<std::int64_t>(top_ids)};
  const logra::Extremes bottom = {pointer<float>(bottom_scores), pointer<std::int64_t>(bottom_ids)};
  released(logra::topk_plane_scores, asked, planes(rows, asked.cols, levels), pointer<const float>(row_scale),
           pointer<const float>(row_bias), k, row_offset, top, bottom);
}

void self_influence(const View& rows, const View& factor, Address out) {
  released(logra::self_influence, matrix(rows), matrix(factor), pointer<float>(out));
}

logra::ModuleColumns modules(const std::vector<std::int64_t>& sizes,
                             const std::vector<std::int64_t>& exponents) {
  if (sizes.size() != exponents.size())
    throw std::invalid_argument("module_exponents: expected as many as module_sizes");
  return {sizes.size(), sizes.data(), exponents.data()};
}

void pack_rows(const View& rows, const std::vector<std::int64_t>& sizes,
               const std::vector<std::int64_t>& exponents, Address packed, Address row_scale) {
  released(logra::pack_rows, matrix(rows), modules(sizes, exponents), pointer<std::uint16_t>(packed),
           pointer<float>(row_scale));
}

void unpack_rows(const View& packed, Address row_scale, const std::vector<std::int64_t>& sizes,
                 const std::vector<std::int64_t>& exponents, Address rows) {
  released(logra::unpack_rows, matrix(packed), pointer<const float>(row_scale), modules(sizes, exponents),
           pointer<float>(rows));
}

float read_all(Address data, std::size_t count) {
  return released(logra::read_all, pointer<const float>(data), count);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const logra::Isa isa : logra::available_isas()) names.emplace_back(logra::isa_name(isa));
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels of logra_kernels; call them through logra_kernels.ops.";
  m.def("project", &project);
  m.def("projected_gradients", &projected_gradients);
  m.def("projected_coordinates", &projected_coordinates);
  m.def("covariance_update", &covariance_update);
  m.def("scores", &scores);
  m.def("topk_scores", &topk_scores);
  m.def("plane_scores", &plane_scores);
  m.def("topk_plane_scores", &topk_plane_scores);
  m.def("self_influence", &self_influence);
  m.def("pack_rows", &pack_rows);
  m.def("unpack_rows", &unpack_rows);
  m.def("read_all", &read_all);
  m.def("multiply", &logra::multiply, py::call_guard<py::gil_scoped_release>());
  m.def("multiply_bytes", &logra::multiply_bytes, py::call_guard<py::gil_scoped_release>());
  m.def("multiply_tiles", &logra::multiply_tiles, py::call_guard<py::gil_scoped_release>());
#ifdef __clang__
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  m.def("isa", [] { return std::string(logra::isa_name(logra::active_isa())); });
  m.def("available_isas", &available_isas);
  m.def("set_isa", &logra::set_isa);
  logra::active_isa();  // a wrong LOGRA_ISA fails here, at import
}
