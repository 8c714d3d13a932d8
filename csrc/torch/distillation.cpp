#include "distillation.h"

namespace fusedloss {

namespace {

// The number of a name in a list; raises what was expected.
template <class Enum, size_t kCount>
Enum number_of(std::string_view name, const char* what, const char* const (&names)[kCount]) {
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return Enum(i);
  }
  TORCH_CHECK_VALUE(false, "kl_divergence: expected ", what, " of ", c10::ArrayRef<const char*>(names), ", got '", name,
                    "'");
}

RowsOperand operand(const Tensor& tensor) {
  return {tensor.const_data_ptr(), *kernel_dtype(tensor.scalar_type()), tensor.stride(0), tensor.stride(1)};
}

}  // namespace

DistillationCall::DistillationCall(const OptionalTensor& labels, const OptionalTensor& weight,
                                   std::string_view direction, std::string_view teacher_is_,
                                   std::string_view reduction_, int64_t ignore_index, double temperature, double beta,
                                   bool wide, bool with_lse)
    : labels(labels),
      weight(weight),
      divergence(number_of<Divergence>(direction, "a direction", kDirections)),
      teacher_is(number_of<TeacherIs>(teacher_is_, "teacher_is", kTeachers)),
      reduction(number_of<RowsReduction>(reduction_, "a reduction", kRowsReductions)),
      ignore_index(ignore_index),
      temperature(temperature),
      beta(beta),
      wide(wide),
      with_lse(with_lse) {}

DistillationFormula& distillation_formula() {
  static DistillationFormula formula;
  return formula;
}

const char* declines(const Tensor& student, const Tensor& teacher, DistillationCall& call, bool autocast) {
  const at::ScalarType dtype = student.scalar_type();
  const Device& device = device_for(student);
  for (const Tensor* other : {&teacher, pointer_to(call.labels), pointer_to(call.weight)}) {
    if (other && other->device() != student.device()) return "tensors on different devices";
  }
  if (!kernel_dtype(dtype) || !kernel_dtype(teacher.scalar_type()))
    return "the rows are no float64, float32, bfloat16 or float16";
  if (!device.rows_of_any_two_dtypes && teacher.scalar_type() != dtype &&
      !(is_half(dtype) && teacher.scalar_type() == at::kFloat))
    return "a teacher of another dtype than the student's";
  if (student.dim() == 0 || student.numel() == 0) return "the rows are empty";
  if (student.size(-1) > device.most_classes) return "more classes than a kernel counts";
  if (teacher.requires_grad()) return "the teacher requires a gradient";
  if (call.weight && call.weight->requires_grad()) return "the weight requires a gradient";
  const at::IntArrayRef rows = student.sizes().slice(0, size_t(student.dim() - 1));
  const bool fit = teacher.sizes() == student.sizes() && (!call.labels || call.labels->sizes() == rows) &&
                   (!call.weight || call.weight->sizes() == rows);
  if (!fit) return "rows, labels or weights whose shapes do not fit";
  if (call.labels && !at::isIntegralType(call.labels->scalar_type(), /*includeBool=*/true))
    return "labels that are no integers";
  if (call.weight && !at::isFloatingType(call.weight->scalar_type())) return "a weight that is no floating point";
  if (!(call.temperature > 0) || !(call.beta >= 0 && call.beta <= 1)) return "a parameter that is out of range";
  if (at::GradMode::is_enabled() && student.requires_grad()) {
    for (const Tensor* each : {&student, &teacher, pointer_to(call.labels), pointer_to(call.weight)}) {
      if (each && each->is_inference()) return "a gradient beside a tensor that inference mode made";
    }
  }
  const at::ScalarType promoted = at::promote_types(dtype, teacher.scalar_type());
  call.wide = promoted != dtype || (autocast && is_half(dtype));
  return nullptr;
}

DistillationInputs::DistillationInputs(const Tensor& student_, const Tensor& teacher_, const DistillationCall& call)
    : student(student_), teacher(teacher_), reduction(call.reduction) {
  TORCH_CHECK_VALUE(student.dim() == 2 && student.sizes() == teacher.sizes(),
                    "kl_divergence: expected rows of student and teacher of one shape, got ", student.sizes(), " and ",
                    teacher.sizes());
  for (const Tensor* tensor : {&student, &teacher}) {
    TORCH_CHECK(kernel_dtype(tensor->scalar_type()), "kl_divergence: expected floating point rows, got ",
                tensor->scalar_type());
  }
  check_device("kl_divergence", "the teacher", teacher, student);
  TORCH_CHECK_VALUE(call.temperature > 0, "kl_divergence: expected a temperature above 0, got ", call.temperature);
  TORCH_CHECK_VALUE(call.beta >= 0 && call.beta <= 1, "kl_divergence: expected a beta from 0 to 1, got ", call.beta);
  const bool in_double = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  arithmetic = in_double ? at::kDouble : at::kFloat;
  result = call.wide ? arithmetic : student.scalar_type();
  args.arithmetic = *kernel_dtype(arithmetic);
  args.rows = student.size(0);
  args.classes = student.size(1);
  TORCH_CHECK(args.classes <= device_for(student).most_classes, "kl_divergence: expected at most ",
              device_for(student).most_classes, " classes, got ", args.classes);
  args.student = operand(student);
  args.teacher = operand(teacher);
  args.divergence = call.divergence;
  args.teacher_is = call.teacher_is;
  args.temperature = call.temperature;
  args.beta = call.beta;
  args.ignore_index = call.ignore_index;
  args.scale = 1;
  if (call.labels) {
    check_numbers("labels", *call.labels, args.rows);
    TORCH_CHECK(call.labels->scalar_type() == at::kLong, "kl_divergence: expected labels in int64, got ",
                call.labels->scalar_type());
    labels = call.labels->contiguous();
    args.labels = labels.const_data_ptr<int64_t>();
  }
  if (call.weight) {
    check_numbers("a weight", *call.weight, args.rows);
    weight = call.weight->to(arithmetic).contiguous();
    args.weight = weight.const_data_ptr();
  }
}

void DistillationInputs::check_numbers(const char* what, const Tensor& tensor, at::IntArrayRef sizes) const {
  TORCH_CHECK(tensor.sizes() == sizes, "kl_divergence: expected ", what, " of size ", sizes, ", got ", tensor.sizes());
  check_device("kl_divergence", what, tensor, student);
}

void DistillationInputs::check_backward(const Tensor& upstream, const OptionalTensor& upstream_lse,
                                        const Tensor& statistics) const {
  check_numbers("an upstream gradient", upstream, none() ? at::IntArrayRef(args.rows) : at::IntArrayRef());
  if (upstream_lse) check_numbers("an upstream gradient of the lse", *upstream_lse, args.rows);
  check_numbers("statistics", statistics, kSavedOfPair * args.rows);
  TORCH_CHECK(statistics.is_contiguous() && statistics.scalar_type() == arithmetic,
              "kl_divergence_backward: expected the statistics of the forward, got ", statistics.scalar_type(),
              " of strides ", statistics.strides());
}

Tensor DistillationInputs::write_gradient() {
  const Tensor grad = empty_gradient(student, student);
  args.grad = operand(grad);
  return grad;
}

Tensor DistillationInputs::write_gradient_in_forward() {
  TORCH_CHECK(!none(), "kl_divergence: expected a reduction for a gradient in forward, got none");
  return write_gradient();
}

void define_distillation(torch::Library& m) {
  const std::string rows = "Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, ";
  const std::string call =
      "str direction, str teacher_is, str reduction, int ignore_index, float temperature, float beta";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("kl_divergence(" + rows + call +
         ", bool wide, bool with_lse, bool with_grad) -> (Tensor loss, Tensor lse, Tensor statistics, Tensor grad)");
  define("kl_divergence.carrying(" + rows + call + ", bool wide) -> (Tensor loss, Tensor statistics)");
  define("kl_divergence_backward(Tensor upstream, Tensor? upstream_lse, " + rows + "Tensor statistics, " + call +
         ") -> Tensor");
}

}  // namespace fusedloss
