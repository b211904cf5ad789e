"""``aoti``: a package that AOTInductor compiled, for a process without Python's interpreter of graphs."""

from pathlib import Path

import torch

from lightning_mixprec.deploy.exporting.closeness import tensors_of
from lightning_mixprec.deploy.exporting.package_code import products_in
from lightning_mixprec.deploy.exporting.programs import layers_of_products, uses_in
from lightning_mixprec.deploy.exporting.protocol import Job, Opened
from lightning_mixprec.errors import ExportError, one_line


class Aoti:
    """Packages of compiled code that ``torch._inductor.aoti_load_package`` runs."""

    name = "aoti"

    def check(self, path: Path, job: Job) -> None:
        """Asks for a C++ compiler, and for the suffix that torch insists on.

        Raises:
            ExportError: One of them is missing.
        """
        if path.suffix != ".pt2":
            raise ExportError(f"an aoti package is called '*.pt2', here {path.name!r}; name it so")
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception as error:
            raise ExportError(
                f"AOTInductor needs a C++ compiler, and there is none ({one_line(error)[:100]}); install g++, or "
                "export to 'pt2', which needs none"
            ) from error

    def write(self, path: Path, job: Job) -> None:
        """Compiles the program; roundings to 16 bits stay where the program has them."""
        options = {"emulate_precision_casts": True}
        try:
            torch._inductor.aoti_compile_and_package(
                job.program.exported, package_path=str(path), inductor_configs=options
            )
        except Exception as error:  # of a compiler, and of what it calls
            raise ExportError(
                f"AOTInductor cannot compile this module: {one_line(error)[:300]}; export it to 'pt2'"
            ) from error

    def opened(self, path: Path, job: Job) -> Opened:
        """Loads the compiled code; its products are read from its source, other operations from the program."""
        model = torch._inductor.aoti_load_package(str(path))
        program = job.program.exported
        uses = [*products_in(path, layers_of_products(program)), *uses_in(program)]
        return Opened(lambda: tensors_of(model(*job.example.args, **job.example.kwargs)), uses, False)
