//! One flag names the device, and one list says which there are.
//!
//! A backend panics where its driver is missing. Everything here asks first, so that a name which
//! cannot be used is an error that says what to install.

use burn::tensor::Device;

use crate::error::TrainError;

/// The device of a name: `cpu`, `wgpu`, `cuda` or `cuda:N`.
///
/// A GPU is tried with one addition before it is returned.
///
/// # Errors
///
/// An unknown name, a backend that this program was built without, or one that this machine has no
/// driver or device for; the error says what to build or to install.
pub fn device(name: &str) -> Result<Device, TrainError> {
    let found = match Name::parse(name) {
        Ok(Name::Cpu) => cpu(),
        Ok(Name::Wgpu) => wgpu::find(),
        Ok(Name::Cuda(index)) => cuda::find(index),
        Err(reason) => Err(reason),
    };
    found.map_err(|reason| TrainError::Device {
        name: name.to_string(),
        reason,
    })
}

/// The devices of a list of names, `cuda:0,cuda:1`, which share the batches of a training run.
///
/// A device may be named more than once; the first holds the model and its optimizer.
///
/// # Errors
///
/// As [`device`] does.
pub fn device_list(names: &str) -> Result<Vec<Device>, TrainError> {
    names.split(',').map(device).collect()
}

/// A device, and whether this program can use it on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// What `--device` takes.
    pub name: String,
    /// What the device is; or else why it cannot be used, and what to do about it.
    pub usable: Result<String, String>,
}

/// Every device that a program of this workspace could compute on, in the order in which they are
/// described: one entry for each, and one for each backend without any.
///
/// Opens every device that it can.
pub fn devices() -> Vec<DeviceState> {
    let mut states = vec![
        DeviceState {
            name: "cpu".into(),
            usable: cpu().map(|_| format!("{} threads", rayon::current_num_threads())),
        },
        DeviceState {
            name: "wgpu".into(),
            usable: wgpu::describe(),
        },
    ];
    let cards = cuda::describe().into_iter().enumerate();
    states.extend(cards.map(|(index, usable)| DeviceState {
        name: format!("cuda:{index}"),
        usable,
    }));
    states
}

/// Whether a device is this machine's own processor.
pub(crate) fn is_cpu(device: &Device) -> bool {
    #[cfg(feature = "flex")]
    return *device == Device::flex();
    #[cfg(not(feature = "flex"))]
    {
        let _ = device;
        false
    }
}

#[derive(Debug, PartialEq)]
enum Name {
    Cpu,
    Wgpu,
    Cuda(usize),
}

impl Name {
    fn parse(name: &str) -> Result<Self, String> {
        match name.split_once(':') {
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "wgpu" => Ok(Self::Wgpu),
            None if name == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", index)) => match index.parse() {
                Ok(index) => Ok(Self::Cuda(index)),
                Err(_) => Err("expected `cuda` or `cuda:N` with a number N".into()),
            },
            _ if name.contains(',') => {
                Err("expected one device: several train together, and nothing else".into())
            }
            _ => Err("expected `cpu`, `wgpu`, `cuda` or `cuda:N`".into()),
        }
    }
}

fn cpu() -> Result<Device, String> {
    #[cfg(feature = "flex")]
    return Ok(Device::flex());
    #[cfg(not(feature = "flex"))]
    Err("this program was built without the feature `flex`".into())
}

/// What is said of a backend that this program lacks.
#[cfg(not(all(feature = "wgpu", feature = "cuda")))]
fn unbuilt(backend: &str, of_the_machine: &str) -> String {
    format!(
        "this program was built without the feature `{backend}`; `cargo xtask COMMAND --device \
         {backend}` builds one with it, the first time in minutes{of_the_machine}"
    )
}

/// The name of a device that adds two numbers; what went wrong where it does not.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
fn tried(device: &Device) -> Result<String, String> {
    use burn::tensor::Tensor;

    let sum = crate::failure::caught(|| {
        let one = Tensor::<1>::from_floats([1.0], device);
        let sum = (one.clone() + one).try_into_vec_as::<f32>();
        let name = device.identity().map(|identity| identity.name);
        (
            sum,
            name.unwrap_or_else(|| "a device without a name".into()),
        )
    });
    match sum {
        Ok((Ok(sum), name)) if sum == [2.0] => Ok(name),
        Ok((Ok(sum), name)) => Err(format!("{name} takes 1 + 1 for {sum:?}")),
        Ok((Err(error), name)) => Err(format!("{name} computes nothing: {error:?}")),
        Err(failure) => Err(failure.0),
    }
}

mod wgpu {
    use burn::tensor::Device;

    #[cfg(not(feature = "wgpu"))]
    pub(super) fn find() -> Result<Device, String> {
        let drivers = manifests();
        let hint = match &drivers[..] {
            _ if !cfg!(target_os = "linux") => String::new(),
            [] => format!("; {NO_ADAPTER}"),
            drivers => format!("; Vulkan drivers here: {}", drivers.join(", ")),
        };
        Err(super::unbuilt("wgpu", &hint))
    }

    #[cfg(not(feature = "wgpu"))]
    pub(super) fn describe() -> Result<String, String> {
        find().map(|_| String::new())
    }

    /// The device of wgpu's own choice, with its name; found once.
    #[cfg(feature = "wgpu")]
    fn found() -> Result<(Device, String), String> {
        use std::sync::OnceLock;

        use burn::tensor::DeviceType;

        // The runtime can be made once in a process.
        static FOUND: OnceLock<Result<(Device, String), String>> = OnceLock::new();
        let find = || {
            if Device::enumerate(DeviceType::Wgpu).is_empty() {
                return Err(no_adapter());
            }
            let opened = Device::wgpu_options().init();
            let device = opened.map_err(|error| error.to_string())?;
            let name = super::tried(&device)?;
            Ok((device, name))
        };
        FOUND.get_or_init(find).clone()
    }

    #[cfg(feature = "wgpu")]
    pub(super) fn find() -> Result<Device, String> {
        found().map(|(device, _)| device)
    }

    #[cfg(feature = "wgpu")]
    pub(super) fn describe() -> Result<String, String> {
        use burn::tensor::DeviceType;

        let (device, name) = found()?;
        let is_card = device.identity().is_some_and(|it| it.physical.is_some());
        let kind = if is_card {
            String::new()
        } else {
            // A rasterizer in software gives the right numbers.
            ", which is no card: slower than `cpu`".into()
        };
        let others = Device::enumerate(DeviceType::Wgpu).len() - 1;
        let choice = match others {
            0 => String::new(),
            n => format!(
                "; adapters beside it: {n}, chosen by CUBECL_WGPU_DEFAULT_DEVICE, such as \
                 `IntegratedGpu(0)` or `Cpu`"
            ),
        };
        Ok(format!("{name}{kind}{choice}"))
    }

    /// What is missing, and what it would come with.
    #[cfg(feature = "wgpu")]
    fn no_adapter() -> String {
        match std::env::var("VK_DRIVER_FILES") {
            _ if !cfg!(target_os = "linux") => "no graphics adapter: install its driver".into(),
            Ok(files) => format!("{NO_ADAPTER}; VK_DRIVER_FILES names `{files}` and no other"),
            Err(_) => NO_ADAPTER.into(),
        }
    }

    const NO_ADAPTER: &str = "no graphics adapter with a Vulkan driver: install the driver of the \
                              card, or one that computes on the CPU, and the loader (Debian and \
                              Ubuntu: `apt-get install mesa-vulkan-drivers`)";

    /// The Vulkan drivers that are installed, by the names of their manifests.
    #[cfg(not(feature = "wgpu"))]
    fn manifests() -> Vec<String> {
        let folders = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"];
        let entries = folders
            .iter()
            .filter_map(|folder| std::fs::read_dir(folder).ok());
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(Result::ok)
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

mod cuda {
    use burn::tensor::Device;

    #[cfg(not(feature = "cuda"))]
    pub(super) fn find(_index: usize) -> Result<Device, String> {
        let hint = match driver() {
            _ if !cfg!(target_os = "linux") => String::new(),
            Some(version) => format!("; the NVIDIA driver here: {version}"),
            None => format!("; {NO_DRIVER}"),
        };
        Err(super::unbuilt("cuda", &hint))
    }

    #[cfg(not(feature = "cuda"))]
    pub(super) fn describe() -> Vec<Result<String, String>> {
        vec![find(0).map(|_| String::new())]
    }

    #[cfg(feature = "cuda")]
    pub(super) fn find(index: usize) -> Result<Device, String> {
        open(index).map(|(device, _)| device)
    }

    #[cfg(feature = "cuda")]
    pub(super) fn describe() -> Vec<Result<String, String>> {
        (0..count().max(1))
            .map(|index| open(index).map(|(_, name)| name))
            .collect()
    }

    #[cfg(feature = "cuda")]
    fn count() -> usize {
        Device::enumerate(burn::tensor::DeviceType::Cuda).len()
    }

    #[cfg(feature = "cuda")]
    fn open(index: usize) -> Result<(Device, String), String> {
        let n = count();
        if n == 0 {
            return Err(match driver() {
                Some(version) => format!(
                    "no card that the driver lets this program see; the driver here: {version}"
                ),
                None => NO_DRIVER.into(),
            });
        }
        if index >= n {
            return Err(format!("there are {n} cards here, from 0"));
        }
        let device = Device::cuda(index);
        let name = super::tried(&device).map_err(|reason| {
            format!(
                "{reason}; kernels are compiled by the CUDA toolkit's NVRTC (Debian and Ubuntu: \
                 `cuda-nvrtc` and `cuda-cudart-dev` of NVIDIA's repository), which CUDA_PATH names"
            )
        })?;
        Ok((device, name))
    }

    const NO_DRIVER: &str = "no NVIDIA driver: install the one that your distribution packages or \
                             NVIDIA offers, until `nvidia-smi` lists the card";

    /// The version of the driver that the kernel runs.
    fn driver() -> Option<String> {
        let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
        text.lines().next().map(|line| line.trim().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cpu_wgpu_and_cuda_with_a_number() {
        assert_eq!(Name::parse("cpu"), Ok(Name::Cpu));
        assert_eq!(Name::parse("wgpu"), Ok(Name::Wgpu));
        assert_eq!(Name::parse("cuda"), Ok(Name::Cuda(0)));
        assert_eq!(Name::parse("cuda:3"), Ok(Name::Cuda(3)));
    }

    #[test]
    fn unknown_devices_are_refused_by_name() {
        for name in ["gpu", "cuda:x", "cuda:", "cudax", "cpu:0", "", "cpu,cpu"] {
            let error = device(name).unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }

    #[test]
    fn a_list_is_as_good_as_each_of_its_devices() {
        if let Ok(device) = device("cpu") {
            let both = device_list("cpu,cpu").unwrap();
            assert!(both.len() == 2 && both.iter().all(|one| *one == device));
        }
        for (names, bad) in [("cpu,gpu", "gpu"), ("cpu,", ""), (",cpu", "")] {
            let error = device_list(names).unwrap_err().to_string();
            assert!(error.contains(&format!("`{bad}`")), "{error}");
        }
    }

    #[test]
    fn a_device_is_usable_or_says_what_to_do() {
        let states = devices();
        let names: Vec<&str> = states.iter().map(|state| &state.name[..]).collect();
        assert_eq!(names[..3], ["cpu", "wgpu", "cuda:0"]);
        for state in states {
            match (state.usable, device(&state.name)) {
                (Ok(_), Ok(_)) => {}
                (Err(reason), Err(error)) => {
                    assert!(error.to_string().ends_with(&reason), "{error}\n{reason}");
                    let says_what_to_do = ["cargo xtask", "install", "CUDA_PATH"]
                        .iter()
                        .any(|what| reason.contains(what));
                    assert!(says_what_to_do, "{}: {reason}", state.name);
                }
                (usable, opened) => panic!("{}: {usable:?}, {opened:?}", state.name),
            }
        }
    }
}
