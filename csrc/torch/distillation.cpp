#include "distillation.h"

namespace fusedloss {

namespace {

// The place of a name in a list; raises what was expected.
template <size_t kCount>
size_t place_of(std::string_view name, const char* what, const char* const (&names)[kCount]) {
  for (size_t i = 0; i < kCount; ++i) {
    if (name == names[i]) return i;
  }
  TORCH_CHECK_VALUE(false, "kl_divergence: expected ", what, " of ", c10::ArrayRef<const char*>(names), ", got '", name,
                    "'");
}

RowsOperand operand(const Tensor& tensor) {
  return {tensor.const_data_ptr(), *kernel_dtype(tensor.scalar_type()), tensor.stride(0), tensor.stride(1)};
}

}  // namespace

DistillationInputs::DistillationInputs(const Tensor& student_, const Tensor& teacher_, const OptionalTensor& labels_,
                                       const OptionalTensor& weight_, std::string_view divergence,
                                       std::string_view teacher_is, std::string_view reduction, int64_t ignore_index,
                                       double temperature, double beta, bool wide)
    : student(student_), teacher(teacher_) {
  TORCH_CHECK_VALUE(student.dim() == 2 && student.sizes() == teacher.sizes(),
                    "kl_divergence: expected rows of student and teacher of one shape, got ", student.sizes(), " and ",
                    teacher.sizes());
  for (const Tensor* tensor : {&student, &teacher}) {
    TORCH_CHECK(kernel_dtype(tensor->scalar_type()), "kl_divergence: expected floating point rows, got ",
                tensor->scalar_type());
  }
  check_device("kl_divergence", "the teacher", teacher, student);
  TORCH_CHECK_VALUE(temperature > 0, "kl_divergence: expected a temperature above 0, got ", temperature);
  TORCH_CHECK_VALUE(beta >= 0 && beta <= 1, "kl_divergence: expected a beta from 0 to 1, got ", beta);
  const size_t of_reduction = place_of(reduction, "a reduction", {"none", "sum", "batchmean", "mean"});
  none = of_reduction == 0;
  by_row = of_reduction == 2;
  by_element = of_reduction == 3;
  const bool in_double = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  arithmetic = in_double ? at::kDouble : at::kFloat;
  result = wide ? arithmetic : student.scalar_type();
  args.arithmetic = *kernel_dtype(arithmetic);
  args.rows = student.size(0);
  args.classes = student.size(1);
  TORCH_CHECK(args.classes <= device_for(student).most_classes, "kl_divergence: expected at most ",
              device_for(student).most_classes, " classes, got ", args.classes);
  args.student = operand(student);
  args.teacher = operand(teacher);
  args.divergence = Divergence(place_of(divergence, "a direction", {"forward", "reverse", "jsd"}));
  args.teacher_is = TeacherIs(place_of(teacher_is, "teacher_is", {"logits", "log_probs", "probs"}));
  args.temperature = temperature;
  args.beta = beta;
  args.ignore_index = ignore_index;
  args.scale = 1;
  if (labels_) {
    check_numbers("labels", *labels_, args.rows);
    TORCH_CHECK(labels_->scalar_type() == at::kLong, "kl_divergence: expected labels in int64, got ",
                labels_->scalar_type());
    labels = labels_->contiguous();
    args.labels = labels.const_data_ptr<int64_t>();
  }
  if (weight_) {
    check_numbers("a weight", *weight_, args.rows);
    weight = weight_->to(arithmetic).contiguous();
    args.weight = weight.const_data_ptr();
  }
}

void DistillationInputs::check_numbers(const char* what, const Tensor& tensor, at::IntArrayRef sizes) const {
  TORCH_CHECK(tensor.sizes() == sizes, "kl_divergence: expected ", what, " of size ", sizes, ", got ", tensor.sizes());
  check_device("kl_divergence", what, tensor, student);
}

Tensor DistillationInputs::write_gradient() {
  const Tensor grad = empty_gradient(student, student);
  args.grad = operand(grad);
  return grad;
}

void define_distillation(torch::Library& m) {
  const std::string rows = "Tensor student, Tensor teacher, Tensor? labels, Tensor? weight, ";
  const std::string call =
      "str direction, str teacher_is, str reduction, int ignore_index, float temperature, float beta";
  m.def(("kl_divergence(" + rows + call +
         ", bool wide, bool with_lse, bool with_grad) -> (Tensor loss, Tensor lse, Tensor statistics, Tensor grad)")
            .c_str());
  m.def(("kl_divergence_backward(Tensor upstream, Tensor? upstream_lse, " + rows + "Tensor statistics, " + call +
         ") -> Tensor")
            .c_str());
}

}  // namespace fusedloss
