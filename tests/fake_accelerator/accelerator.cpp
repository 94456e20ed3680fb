// SPDX-License-Identifier: Apache-2.0
// A device of type "cuda" for a torch that was built for CPUs: its memory is its own, and every operator runs on the CPU
// once it is certain that a GPU would have taken it. What it is there for is said in docs/testing.md.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/histc.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <array>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace py = pybind11;
using at::Tensor;

namespace {

constexpr int kMostDevices = 8;
constexpr int kNaN = 0xFF;  // four, two or eight of these bytes are NaN in every floating dtype

// ---------------------------------------------------------------------------------------------------------- state

struct Block {
  size_t bytes;
  c10::DeviceIndex device;
};

struct Copy {  // one that waits on a stream until somebody waits for it
  Tensor target, source;
  bool done = false;
};

struct State {
  std::recursive_mutex mutex;
  int devices = 1;
  std::array<int64_t, kMostDevices> allocated{}, peak{}, limit{};
  std::map<void*, Block> blocks;
  std::set<void*> pinned;
  std::map<int64_t, std::vector<Copy>> queues;  // by stream
  std::map<std::string, int64_t> counts;        // operators, and begin, wait and record_stream
  std::vector<std::string> mismatches;
  py::object on_wait;  // called with what waits for the device
};

State& state() {
  static State* const kept = new State;  // never destroyed: tensors may outlive everything else
  return *kept;
}

thread_local c10::DeviceIndex current_device = 0;
thread_local int64_t current_stream = 0;

using Lock = std::lock_guard<std::recursive_mutex>;

void count(const std::string& what) {
  Lock lock(state().mutex);
  state().counts[what]++;
}

void waits_for_device(const std::string& what) {
  count("wait for the device: " + what);
  if (!Py_IsInitialized()) return;
  py::gil_scoped_acquire gil;
  if (state().on_wait) state().on_wait(what);
}

c10::DeviceIndex index_of(c10::Device device) { return device.has_index() ? device.index() : current_device; }

// ---------------------------------------------------------------------------------------------------------- memory

void forget_block(void* memory) {
  if (memory == nullptr) return;
  {
    Lock lock(state().mutex);
    auto found = state().blocks.find(memory);
    state().allocated[found->second.device] -= static_cast<int64_t>(found->second.bytes);
    memset(memory, kNaN, found->second.bytes);
    state().blocks.erase(found);
  }
  free(memory);
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device(c10::kCUDA, current_device);
    if (bytes == 0) return {nullptr, nullptr, &forget_block, device};
    void* memory = nullptr;
    Lock lock(state().mutex);
    int64_t& used = state().allocated[current_device];
    const int64_t limit = state().limit[current_device];
    if (limit != 0 && used + static_cast<int64_t>(bytes) > limit) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory: ", bytes, " bytes were asked for, ", used, " of ",
                       limit, " are in use on ", device);
    }
    TORCH_CHECK(posix_memalign(&memory, 512, bytes) == 0, "the host has no memory for the device's");
    memset(memory, kNaN, bytes);
    state().blocks[memory] = {bytes, current_device};
    used += static_cast<int64_t>(bytes);
    state().peak[current_device] = std::max(state().peak[current_device], used);
    return {memory, memory, &forget_block, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &forget_block; }
  void copy_data(void* target, const void* source, size_t bytes) const override { memcpy(target, source, bytes); }
};

void forget_pinned(void* memory) {
  {
    Lock lock(state().mutex);
    state().pinned.erase(memory);
  }
  free(memory);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, 4096, std::max<size_t>(bytes, 1)) == 0, "no memory");
    memset(memory, kNaN, bytes);
    Lock lock(state().mutex);
    state().pinned.insert(memory);
    return {memory, memory, &forget_pinned, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &forget_pinned; }
  void copy_data(void* target, const void* source, size_t bytes) const override { memcpy(target, source, bytes); }
};

DeviceMemory device_memory;
PinnedMemory pinned_memory;

bool is_pinned(const Tensor& tensor) {
  Lock lock(state().mutex);
  return tensor.has_storage() && tensor.storage().nbytes() != 0 &&
         state().pinned.count(tensor.storage().mutable_data()) != 0;
}

// The same memory as a tensor of the CPU, which keeps the device's alive.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  const c10::Storage& storage = tensor.storage();
  if (storage.nbytes() == 0) {  // which an operator may want to make larger
    return at::empty_strided(tensor.sizes(), tensor.strides(), at::device(c10::kCPU).dtype(tensor.dtype()));
  }
  c10::DataPtr same(storage.mutable_data(), new c10::Storage(storage),
                    [](void* kept) { delete static_cast<c10::Storage*>(kept); }, c10::Device(c10::kCPU));
  c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(same), nullptr, false);
  Tensor found = at::detail::make_tensor<c10::TensorImpl>(std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                          tensor.dtype());
  found.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  found._set_conj(tensor.is_conj());
  found._set_neg(tensor.is_neg());
  return found;
}

Tensor new_on_device(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype) {
  return at::detail::empty_strided_generic(sizes, strides, &device_memory, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           dtype);
}

// ---------------------------------------------------------------------------------------------------------- streams

void flush(int64_t stream, size_t first_copies) {
  Lock lock(state().mutex);
  auto& queue = state().queues[stream];
  for (size_t at = 0; at < std::min(first_copies, queue.size()); ++at) {
    Copy& copy = queue[at];
    if (copy.done) continue;
    copy.done = true;
    on_host(copy.target).copy_(on_host(copy.source));
    copy.target = copy.source = Tensor();
  }
}

// A copy between the host and the device: at once, or when its stream is waited for.
void copy_over(const Tensor& target, const Tensor& source, bool non_blocking) {
  if (target.numel() == 0) return;
  if (target.is_cuda() != source.is_cuda()) {
    const bool to_host = !target.is_cuda();
    const bool pinned = is_pinned(to_host ? target : source);
    if (non_blocking && pinned && target.scalar_type() == source.scalar_type()) {
      if (current_stream != 0) {
        Lock lock(state().mutex);
        state().queues[current_stream].push_back({target, source});
        state().counts["copy begun on a stream"]++;
        return;
      }
    } else {
      waits_for_device(std::string(to_host ? "copy to the host" : "copy to the device") +
                       (pinned ? " of pinned memory" : ""));
    }
  }
  on_host(target).copy_(on_host(source));
}

// ---------------------------------------------------------------------------------------------------------- device

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device getDevice() const override { return {c10::kCUDA, current_device}; }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(index_of(device) < state().devices, "CUDA error: invalid device ordinal ", device);
    current_device = index_of(device);
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current_device = index_of(device); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(state().devices); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCUDA, index_of(device)), current_stream);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_stream = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override { flush(stream.id(), SIZE_MAX); }
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

}  // namespace

namespace at {

struct CUDAHooks : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return state().devices; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(state().devices); }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { ::current_device = index; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const DeviceIndex before = ::current_device;
    if (index >= 0) ::current_device = index;
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* memory) const override {
    Lock lock(state().mutex);
    return state().pinned.count(const_cast<void*>(memory)) != 0;
  }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Device getDeviceFromPtr(void* memory) const override {
    Lock lock(state().mutex);
    auto found = state().blocks.find(memory);
    return {kCUDA, found == state().blocks.end() ? ::current_device : found->second.device};
  }
  const Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace {

// ---------------------------------------------------------------------- operators that know where memory is

Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device.value_or(c10::Device(c10::kCUDA, current_device)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &device_memory,
                                   c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device.value_or(c10::Device(c10::kCUDA, current_device)));
  return new_on_device(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), c10::dtype_or_default(dtype));
}

Tensor as_strided(const Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides,
                  std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->expect_int();
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides),
                                           start);
}

Tensor view(const Tensor& self, c10::SymIntArrayRef sizes) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(sizes));
}

Tensor reshape_alias(const Tensor& self, c10::SymIntArrayRef sizes, c10::SymIntArrayRef strides) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

void grow(const Tensor& tensor, size_t bytes) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  c10::DeviceGuard guard(tensor.device());
  c10::DataPtr memory = device_memory.allocate(bytes);
  if (storage->nbytes() != 0) memcpy(memory.get(), storage->mutable_data(), std::min(bytes, storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(memory));
  storage->set_nbytes(bytes);
}

const Tensor& resize(const Tensor& self, c10::SymIntArrayRef sizes, std::optional<at::MemoryFormat>) {
  const auto wanted = C10_AS_INTARRAYREF_SLOW(sizes);
  int64_t elements = self.storage_offset();
  elements += c10::multiply_integers(wanted);
  const size_t bytes = static_cast<size_t>(elements) * self.element_size();
  if (self.storage().nbytes() < bytes) grow(self, bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(wanted);
  return self;
}

Tensor& copy_in_place(Tensor& self, const Tensor& source, bool non_blocking) {
  copy_over(self, source, non_blocking);
  return self;
}

Tensor copy_from(const Tensor& source, const Tensor& target, bool non_blocking) {
  copy_over(target, source, non_blocking);
  return target;
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  if (target.sizes() != source.sizes()) resize(target, source.sym_sizes(), std::nullopt);
  copy_over(target, source, false);
  return target;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  waits_for_device("item");
  return on_host(self).item();
}

// Of integers, too, which the CPU's does not take.
Tensor histc(const Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  count("aten::histc");
  c10::DeviceGuard guard(self.device());
  const Tensor counted = on_host(self).to(at::kDouble).histc(bins, least, most).to(self.scalar_type());
  Tensor found = new_on_device(counted.sizes(), counted.strides(), counted.scalar_type());
  on_host(found).copy_(counted);
  return found;
}

void record_stream(Tensor&, c10::Stream) { count("record_stream"); }

Tensor& set_all(Tensor& self, at::Storage storage, int64_t offset, at::IntArrayRef sizes, at::IntArrayRef strides) {
  std::vector<int64_t> steps(strides.begin(), strides.end());
  if (steps.size() != sizes.size()) {
    steps.assign(sizes.size(), 1);
    for (size_t at = sizes.size(); at-- > 1;) steps[at - 1] = steps[at] * std::max<int64_t>(sizes[at], 1);
  }
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, steps, offset);
  return self;
}

Tensor& set_storage_offset(Tensor& self, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef sizes,
                           c10::SymIntArrayRef strides) {
  return set_all(self, std::move(storage), offset.expect_int(), C10_AS_INTARRAYREF_SLOW(sizes),
                 C10_AS_INTARRAYREF_SLOW(strides));
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / self.element_size());
  return set_all(self, std::move(storage), 0, {elements}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_all(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

Tensor& set_nothing(Tensor& self) {
  at::Storage storage(c10::Storage::use_byte_size_t(), 0, device_memory.allocate(0), &device_memory, true);
  return set_all(self, std::move(storage), 0, {0}, {1});
}

// ------------------------------------------------------------------------------------------- all other operators

// Those whose result's size, or whose check, depends on values: CUDA's versions wait for the device.
bool depends_on_values(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::nonzero",    "aten::nonzero.out", "aten::_unique2",      "aten::unique_consecutive", "aten::unique_dim",
      "aten::bincount",   "aten::equal",       "aten::masked_select", "aten::is_nonzero",
      "aten::repeat_interleave.Tensor",
  };
  return names.count(name) != 0;
}

// Indexing takes indices from the host, which CUDA's version then copies.
bool takes_host_indices(const std::string& name) {
  return name.rfind("aten::index.", 0) == 0 || name.rfind("aten::index_put", 0) == 0 ||
         name.rfind("aten::_index_put_impl_", 0) == 0 || name.rfind("aten::_unsafe_index", 0) == 0;
}

// Whether a number on the host, a tensor without dimensions, may stand beside tensors of the device: pointwise operators only.
bool takes_host_numbers(const std::string& name) {
  static const char* const others[] = {"mm",     "mv",       "linear",  "index_select", "gather", "scatter", "::cat",
                                       "stack",  "index_add", "index_copy", "searchsorted", "embedding", "scaled_dot",
                                       "linalg", "cholesky", "optq::",  "::sort",      "conv"};
  for (const char* part : others) {
    if (name.find(part) != std::string::npos) return false;
  }
  return true;
}

void for_each_tensor(const c10::IValue& value, const std::function<void(const Tensor&)>& act) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) act(value.toTensor());
  } else if (value.isList()) {
    for (const c10::IValue& each : value.toListRef()) for_each_tensor(each, act);
  }
}

c10::IValue value_on_host(const c10::IValue& value) {
  if (value.isTensor()) return value.toTensor().defined() ? c10::IValue(on_host(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<Tensor> found;
    for (const Tensor& each : value.toTensorVector()) found.push_back(on_host(each));
    return found;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> found;
    for (const std::optional<Tensor>& each : value.toOptionalTensorList().vec()) {
      found.push_back(each.has_value() ? std::optional<Tensor>(on_host(*each)) : std::nullopt);
    }
    return found;
  }
  if (value.isDevice()) return c10::Device(c10::kCPU);
  return value;
}

// Which device the operator runs on. Raises where CUDA would: operands are on several, or on the host.
c10::Device device_of(const std::string& name, const c10::ArrayRef<c10::IValue> arguments) {
  std::optional<c10::Device> found;
  std::string seen;
  bool apart = false, host_index = false;
  for (const c10::IValue& argument : arguments) {
    for_each_tensor(argument, [&](const Tensor& tensor) {
      if (tensor.is_cuda() && !found) found = tensor.device();
    });
    if (argument.isDevice() && argument.toDevice().is_cuda() && !found) found = argument.toDevice();
  }
  size_t place = 0;
  for (const c10::IValue& argument : arguments) {
    for_each_tensor(argument, [&](const Tensor& tensor) {
      seen += (seen.empty() ? "" : ", ") + tensor.device().str() + c10::str(tensor.sizes());
      if (tensor.is_cuda()) {
        apart = apart || tensor.device() != *found;
      } else if (place > 0 && takes_host_indices(name)) {
        host_index = host_index || tensor.dim() > 0;
      } else if (tensor.dim() != 0 || !takes_host_numbers(name)) {
        apart = true;
      }
    });
    ++place;
  }
  if (host_index) waits_for_device(name + " with indices of the host");
  if (apart) {
    const std::string said = "Expected all tensors to be on the same device: " + name + "(" + seen + ")";
    Lock lock(state().mutex);
    state().mismatches.push_back(said);
    TORCH_CHECK(false, said);
  }
  return found.value_or(c10::Device(c10::kCUDA, current_device));
}

// The operator's result, which is on the host, as CUDA would return it: the operand itself, a view of it, or memory of the device.
Tensor result_on_device(const Tensor& result, const at::Argument& returned, const c10::FunctionSchema& schema,
                        const std::vector<c10::IValue>& originals) {
  if (!result.defined()) return result;
  const at::AliasInfo* alias = returned.alias_info();
  for (size_t at = 0; at < originals.size(); ++at) {
    if (!originals[at].isTensor() || !originals[at].toTensor().defined()) continue;
    const Tensor original = originals[at].toTensor();
    const at::AliasInfo* own = schema.arguments()[at].alias_info();
    if (alias != nullptr && alias->isWrite() && own != nullptr && own->beforeSets() == alias->beforeSets()) {
      if (!original.is_cuda()) return original;
      if (original.sizes() != result.sizes() || on_host(original).data_ptr() != result.data_ptr()) {  // out= grew
        resize(original, result.sym_sizes(), std::nullopt);
        on_host(original).copy_(result);
      }
      return original;
    }
    const bool same_memory = original.is_cuda() && original.storage().nbytes() != 0 && result.storage().nbytes() != 0 &&
                             original.storage().mutable_data() == result.storage().mutable_data();
    if (same_memory) {
      Tensor found = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(original.storage()),
                                                              original.key_set(), result.dtype());
      found.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
      return found;
    }
  }
  Tensor found = new_on_device(result.sizes(), result.strides(), result.scalar_type());
  if (result.numel() != 0) on_host(found).copy_(result);
  return found;
}

void run_on_host(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = handle.schema();
  const std::string overload = schema.operator_name().overload_name;
  const std::string name = schema.operator_name().name + (overload.empty() ? "" : "." + overload);
  const size_t arguments = schema.arguments().size(), first = stack->size() - arguments;
  count(name);
  if (depends_on_values(name)) waits_for_device(name);
  std::vector<c10::IValue> originals(stack->begin() + static_cast<int64_t>(first), stack->end());
  c10::DeviceGuard guard(device_of(name, originals));
  for (size_t at = first; at < stack->size(); ++at) (*stack)[at] = value_on_host((*stack)[at]);
  handle.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  const size_t results = schema.returns().size(), begin = stack->size() - results;
  for (size_t at = 0; at < results; ++at) {
    c10::IValue& value = (*stack)[begin + at];
    const at::Argument& returned = schema.returns()[at];
    if (value.isTensor()) {
      value = result_on_device(value.toTensor(), returned, schema, originals);
    } else if (value.isTensorList()) {
      c10::List<Tensor> found;
      for (const Tensor& each : value.toTensorVector()) {
        found.push_back(result_on_device(each, returned, schema, originals));
      }
      value = found;
    }
  }
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", resize);
  m.impl("copy_", copy_in_place);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("histc", histc);
  m.impl("record_stream", record_stream);
  m.impl("set_", set_nothing);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("set_.source_Tensor", set_tensor);
}

}  // namespace

PYBIND11_MODULE(fake_cuda, m) {
  c10::SetAllocator(c10::kCUDA, &device_memory, 255);
  m.def("set_devices", [](int count) {
    TORCH_CHECK(count >= 1 && count <= kMostDevices, "1 to ", kMostDevices, " devices");
    state().devices = count;
  });
  m.def("set_limit", [](int device, int64_t bytes) { state().limit.at(device) = bytes; });
  m.def("allocated", [](int device) { return state().allocated.at(device); });
  m.def("peak", [](int device) { return state().peak.at(device); });
  m.def("reset_peak", [](int device) { state().peak.at(device) = state().allocated.at(device); });
  m.def("device", [] { return static_cast<int>(current_device); });
  m.def("exchange_device", [](int index) {
    const int before = current_device;
    TORCH_CHECK(index < state().devices, "CUDA error: invalid device ordinal ", index);
    if (index >= 0) current_device = static_cast<c10::DeviceIndex>(index);
    return before;
  });
  m.def("stream", [] { return current_stream; });
  m.def("set_stream", [](int64_t stream) { current_stream = stream; });
  m.def("queued", [](int64_t stream) {
    Lock lock(state().mutex);
    return state().queues[stream].size();
  });
  m.def("flush", [](int64_t stream, size_t copies) { flush(stream, copies); });
  m.def("counts", [] {
    Lock lock(state().mutex);
    return state().counts;
  });
  m.def("reset_counts", [] {
    Lock lock(state().mutex);
    state().counts.clear();
  });
  m.def("count", [](const std::string& what) { count(what); });
  m.def("mismatches", [] { return state().mismatches; });
  m.def("on_wait", [](py::object call) { state().on_wait = std::move(call); });
}
