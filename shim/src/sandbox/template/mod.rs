//! Templates: saved guests. A pod's guest is made from a template, which takes less time than a boot, and shares the
//! pages that it does not change with the other guests of the template.
//!
//! After the first boot of a class ([`husk_config::template::Class`]), the shim starts a process that makes the template
//! ([`crate::sandbox::template_builder`]). Its guest never runs a pod.

mod class;
mod start;
mod store;

use std::path::Path;

use husk_config::template::{Class, STORE};
use husk_config::{Config, TemplateShare, Templates};

use crate::resources::BootSize;
use crate::sandbox::guest_image::GuestImages;
use crate::{blocking, chain};

pub use self::class::{Key, class_of, memory_sizes};
pub use self::start::start_builder;
pub use self::store::{Identity, Store, StoreError, Template, delay, find, is_delayed};

/// A pod for whose guest a template is wanted.
pub struct Wish<'a> {
    /// The Kubernetes pod as `namespace/name`, or an empty text.
    pub pod: &'a str,
    /// Number of interfaces.
    pub interfaces: usize,
    /// The size of the VM.
    pub size: &'a BootSize,
}

/// How a pod's guest begins.
#[derive(Debug)]
pub enum Choice {
    /// The guest is made from a template of this class.
    Template(Template, Class),
    /// The guest boots.
    Boot {
        /// The class of the template that should be made. `None` if templates do not suit the pod or are made by an
        /// operator.
        wanted: Option<Class>,
    },
}

/// Chooses the template from which a pod's guest is made, if there is one.
pub fn choose(wish: Wish<'_>, images: &GuestImages, config: &Config) -> Choice {
    const BOOT: Choice = Choice::Boot { wanted: None };
    let Wish { pod, interfaces, size } = wish;
    // A pod with kernel parameters has a kernel of its own. Interfaces occupy slots for hot-plugged devices.
    let suits = config.template != Templates::Off
        && size.kernel_params.is_empty()
        && interfaces <= MAX_INTERFACES
        && !cfg!(feature = "failpoints");
    if !suits {
        return BOOT;
    }
    let namespace = pod.split_once('/').map(|(namespace, _)| namespace);
    let namespace = namespace.filter(|_| config.template_share == TemplateShare::Namespace);
    let Some(class) = class_of(size, config, namespace) else { return BOOT };
    let found = Key::new(&class, images, config)
        .map_err(|error| error.to_string())
        .and_then(|key| find(Path::new(STORE), &key, config.template_max_age()).map_err(|error| chain(&error)));
    match found {
        Ok(Some(template)) => Choice::Template(template, class),
        Ok(None) => Choice::Boot { wanted: (config.template == Templates::Auto).then_some(class) },
        Err(error) => {
            tracing::warn!(error, "the guest boots, because no template can be used");
            BOOT
        }
    }
}

/// Removes a template from which no guest can be made.
pub async fn discard(template: Identity) {
    let _ = blocking::spawn(move || store::discard(Path::new(STORE), &template)).await;
}

/// Records that a guest that was made from a template has failed. The second failure removes the template.
pub async fn strike(template: Identity) {
    let _ = blocking::spawn(move || store::strike(Path::new(STORE), &template)).await;
}

/// Number of interfaces for which a template has slots, in addition to the spare slots.
pub const INTERFACES: u8 = 1;
/// Maximum number of interfaces of a guest that is made from a template.
const MAX_INTERFACES: usize = 2;
