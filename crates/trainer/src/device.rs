//! One flag names the device.

use burn::tensor::Device;

use crate::error::TrainError;

/// The device of a name: `cpu`, `wgpu`, `cuda` or `cuda:N`.
///
/// # Errors
///
/// An unknown name, or a backend that this program was built without.
pub fn device(name: &str) -> Result<Device, TrainError> {
    let refuse = |reason: &str| TrainError::Device {
        name: name.to_string(),
        reason: reason.to_string(),
    };
    match name {
        #[cfg(feature = "flex")]
        "cpu" => Ok(Device::flex()),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(not(feature = "flex"))]
        "cpu" => Err(refuse("this program was built without the feature `flex`")),
        #[cfg(not(feature = "wgpu"))]
        "wgpu" => Err(refuse("this program was built without the feature `wgpu`")),
        _ => match name.strip_prefix("cuda") {
            Some(index) => {
                let index =
                    index
                        .strip_prefix(':')
                        .unwrap_or(if index.is_empty() { "0" } else { "?" });
                let index: usize = index
                    .parse()
                    .map_err(|_| refuse("expected `cuda` or `cuda:N` with a number N"))?;
                cuda(index)
                    .ok_or_else(|| refuse("this program was built without the feature `cuda`"))
            }
            None => Err(refuse("expected `cpu`, `wgpu`, `cuda` or `cuda:N`")),
        },
    }
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Option<Device> {
    Some(Device::cuda(index))
}

#[cfg(not(feature = "cuda"))]
fn cuda(_index: usize) -> Option<Device> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_and_unbuilt_devices_are_refused_by_name() {
        for name in ["gpu", "cuda:x", "cudax", ""] {
            let error = device(name).unwrap_err().to_string();
            assert!(error.contains(&format!("`{name}`")), "{error}");
        }
    }
}
