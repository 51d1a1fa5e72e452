// What layers do in every call that they repeat, without an interpreter, which takes longer than many a kernel: the
// functions of layers/low_bit.py, quantizers/activation.py and ops/cpu/plans.py that are named below, line by line.
// A module of Python's stable interface: one file serves every version.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <cmath>
#include <initializer_list>

namespace {

struct Failed {};  // Python knows the error

// A reference of one's own.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (!object) throw Failed();
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }

  operator PyObject*() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// A string, made when it is used first, and kept.
class Name {
 public:
  explicit Name(const char* text) : text_(text) {}
  operator PyObject*() {
    if (!object_ && !(object_ = PyUnicode_InternFromString(text_))) throw Failed();
    return object_;
  }

 private:
  const char* text_;
  PyObject* object_ = nullptr;
};

// What `use` is given.
PyObject *listeners, *data_ptr, *numel, *is_contiguous, *empty_strided, *float32, *get_threads, *get_isa;

bool answer(int yes) {
  if (yes < 0) throw Failed();
  return yes;
}

bool equal(PyObject* a, PyObject* b) { return a == b || answer(PyObject_RichCompareBool(a, b, Py_EQ)); }

template <class... Arguments>
Owned call(PyObject* function, const Arguments&... arguments) {
  return Owned(PyObject_CallFunctionObjArgs(function, static_cast<PyObject*>(arguments)..., nullptr));
}

template <class... Arguments>
bool tells(PyObject* function, const Arguments&... arguments) {
  return answer(PyObject_IsTrue(call(function, arguments...)));
}

bool is_at(PyObject* tensor, PyObject* place) { return equal(call(data_ptr, tensor), place); }

// Borrowed; null where there is none.
PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* found = dict ? PyDict_GetItemWithError(dict, key) : nullptr;
  if (!found && PyErr_Occurred()) throw Failed();
  return found;
}

void* pointer(PyObject* number) {
  void* place = PyLong_AsVoidPtr(number);
  if (!place && PyErr_Occurred()) throw Failed();
  return place;
}

// ActivationQuantizer.sources
Owned sources(PyObject* quantizer) {
  static Name DICT("__dict__"), READY("_ready"), SOURCES("_sources"), PLACES("_places"), PARAMETERS("_parameters"),
      BUFFERS("_buffers"), LOG_GAIN("log_gain"), INITIAL_SCALE("initial_scale"), LOW("low"), METHOD("sources");
  const Owned state(PyObject_GetAttr(quantizer, DICT));
  PyObject *kept = item(state, SOURCES), *places = item(state, PLACES), *buffers = item(state, BUFFERS);
  PyObject* now[] = {item(item(state, PARAMETERS), LOG_GAIN), item(buffers, INITIAL_SCALE), item(buffers, LOW)};
  bool same = item(state, READY) == Py_True && kept && places && PyTuple_Size(kept) == 3 && PyTuple_Size(places) == 3;
  for (int i = 0; same && i < 3; ++i)
    same = now[i] == PyTuple_GetItem(kept, i) && is_at(now[i], PyTuple_GetItem(places, i));
  if (same) return Owned(Py_NewRef(kept));
  return call(Owned(PyObject_GetAttr(quantizer, METHOD)));
}

// The fields of _Facts of ops/cpu/plans.py, in its order.
enum Fact {
  KERNEL,
  STRUCTURE,
  SOURCES,
  PACKED,
  CHANNEL_SCALE,
  BIAS,
  VERSION,
  PACKED_PLACE,
  SCALE_PLACE,
  BIAS_PLACE,
  BIAS_SIZE,
  THREADS,
  ISA,
  SHAPE,
  STRIDES,
  DTYPE,
  HELD,
  FACTS,
};

// Of ops/cpu/plans.py: the first half of _run.
bool holds(PyObject* facts, PyObject* const* now) {
  static Name VERSION_NAME("_version"), DTYPE_NAME("dtype");
  const auto fact = [facts](int i) { return PyTuple_GetItem(facts, i); };
  for (int i = SOURCES; i <= BIAS; ++i)
    if (now[i - SOURCES] != fact(i)) return false;
  PyObject *packed = fact(PACKED), *scale = fact(CHANNEL_SCALE), *bias = fact(BIAS);
  if (!equal(Owned(PyObject_GetAttr(packed, VERSION_NAME)), fact(VERSION)) || !is_at(packed, fact(PACKED_PLACE)) ||
      !is_at(scale, fact(SCALE_PLACE)) || !tells(is_contiguous, scale) || !equal(call(get_threads), fact(THREADS)) ||
      !equal(call(get_isa), fact(ISA)))
    return false;
  return bias == Py_None ||
         (is_at(bias, fact(BIAS_PLACE)) && equal(call(numel, bias), fact(BIAS_SIZE)) && tells(is_contiguous, bias) &&
          Owned(PyObject_GetAttr(bias, DTYPE_NAME)) == float32);
}

// Its second half.
PyObject* result(PyObject* facts, PyObject* x) {
  using Kernel = int (*)(const void* structure, const void* x, void* y);
  enum Outcome { DONE, NOT_A_NUMBER, CHANGED };  // runtime/watch.h
  const auto fact = [facts](int i) { return PyTuple_GetItem(facts, i); };
  Owned y = call(empty_strided, fact(SHAPE), fact(STRIDES), fact(DTYPE));
  const auto kernel = reinterpret_cast<Kernel>(pointer(fact(KERNEL)));
  void *structure = pointer(fact(STRUCTURE)), *from = pointer(call(data_ptr, x)), *to = pointer(call(data_ptr, y));
  int outcome;
  Py_BEGIN_ALLOW_THREADS;
  outcome = kernel(structure, from, to);
  Py_END_ALLOW_THREADS;
  if (outcome == CHANGED) return Py_NewRef(Py_None);
  return outcome == DONE ? y.release() : PyObject_CallMethod(y, "fill_", "d", NAN);
}

// An own reference to what was found, or to None: what runs meanwhile may replace it.
Owned held(PyObject* found) { return Owned(Py_NewRef(found ? found : Py_None)); }

// LowBitLayer.planned
PyObject* planned(PyObject* state, PyObject* x, PyObject* output_padding) {
  static Name PLANS("_plans"), PLANNED_WEIGHT("_planned_weight"), PARAMETERS("_parameters"), MODULES("_modules"),
      WEIGHT("weight"), BIAS_NAME("bias"), ACTIVATION("activation"), PACKED_NAME("packed"), SCALE("channel_scale");
  const Owned plans = held(item(state, PLANS));
  if (plans == Py_None) return Py_NewRef(Py_None);
  for (Py_ssize_t i = 0; i < PyTuple_Size(listeners); ++i)
    if (tells(PyTuple_GetItem(listeners, i))) return Py_NewRef(Py_None);
  for (Py_ssize_t i = 0; i < PyTuple_Size(plans); ++i) {
    const auto field = [entry = PyTuple_GetItem(plans, i)](int which) { return PyTuple_GetItem(entry, which); };
    PyObject *is_such = field(0), *padding = field(1), *plan = field(2);
    if (!tells(is_such, x) || !equal(padding, output_padding)) continue;
    PyObject* parameters = item(state, PARAMETERS);
    const Owned weight = held(item(parameters, WEIGHT)), bias = held(item(parameters, BIAS_NAME));
    const Owned quantizer = held(item(item(state, MODULES), ACTIVATION));
    if (answer(PyObject_HasAttr(weight, PACKED_NAME))) {
      const Owned of = quantizer == Py_None ? held(nullptr) : sources(quantizer);
      const Owned packed(PyObject_GetAttr(weight, PACKED_NAME)), scale(PyObject_GetAttr(weight, SCALE));
      Owned y = call(plan, x, of, packed, scale, bias);
      if (y != Py_None) return y.release();
    }
    for (PyObject* forgotten : {static_cast<PyObject*>(PLANS), static_cast<PyObject*>(PLANNED_WEIGHT)})
      if (item(state, forgotten)) answer(PyDict_DelItem(state, forgotten));
    break;
  }
  return Py_NewRef(Py_None);
}

// Turns Failed into what Python expects.
template <class Function>
PyObject* guarded(Function function) {
  try {
    return function();
  } catch (const Failed&) {
    return nullptr;
  }
}

PyObject* wrong(const char* wanted, Py_ssize_t count) {
  PyErr_Format(PyExc_TypeError, "%s, got %zd arguments.", wanted, count);
  return nullptr;
}

PyObject* run_method(PyObject* facts, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 5) return wrong("a plan takes x, sources, packed, channel_scale and bias", count);
  return guarded([&] {
    return holds(facts, arguments + 1) ? result(facts, arguments[0]) : Py_NewRef(Py_None);
  });
}

PyObject* planned_method(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 3) return wrong("planned takes a layer's __dict__, x and output_padding", count);
  return guarded([&] { return planned(arguments[0], arguments[1], arguments[2]); });
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef run = {"plan", fast(run_method), METH_FASTCALL, "What ops/library.py calls a Plan."};

PyObject* bind(PyObject*, PyObject* facts) {
  if (!PyTuple_Check(facts) || PyTuple_Size(facts) != FACTS) {
    PyErr_Format(PyExc_TypeError, "bind takes a tuple of %d facts: csrc was compiled from other sources.", FACTS);
    return nullptr;
  }
  return PyCFunction_NewEx(&run, facts, nullptr);
}

PyObject* use(PyObject*, PyObject* objects) {
  if (!PyArg_ParseTuple(objects, "OOOOOOOO", &listeners, &data_ptr, &numel, &is_contiguous, &empty_strided,
                        &float32, &get_threads, &get_isa))
    return nullptr;
  Py_INCREF(objects);
  return Py_NewRef(Py_None);
}

PyMethodDef methods[] = {
    {"use", use, METH_VARARGS,
     "Set what all calls ask: functions that tell whether someone listens, Tensor.data_ptr, numel, is_contiguous, an "
     "empty_strided for the CPU, torch.float32, what tells the number of threads, and the instruction set."},
    {"bind", bind, METH_O, "ops/cpu/plans.py's _run of a tuple of facts."},
    {"planned", fast(planned_method), METH_FASTCALL, "LowBitLayer.planned of a layer's __dict__, x, output_padding."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_calls", "Calls of plans.", -1, methods,
                      nullptr,               nullptr,  nullptr,           nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__calls() { return PyModule_Create(&module); }
