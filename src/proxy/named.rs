//! The instances that flags and files name, at the start and when they are read again.
//!
//! Owns what was said last, since only a change of it is a wish: an instance whose role was changed while it ran (`role`) keeps
//! that when the files are read again and say of it what they said before. Refuses to know instances that came otherwise: a
//! file that names one of those, too, changes nothing of it.

use std::sync::Arc;
use std::time::Duration;

use super::config::{EventsRule, InstanceAddress, Role};
use super::registry::{Instance, NewInstance, Origin};
use super::{App, StartError, role};

/// How long requests of an instance that gets another role may take to end.
const ROLE_DEADLINE: Duration = Duration::from_secs(60);

/// Instances and their roles, as they are written.
#[derive(Clone, Debug, Default)]
pub(crate) struct Named(Vec<(InstanceAddress, Role)>);

impl Named {
    /// Of two lists; in both is both. `Err`: twice in one.
    fn of(
        prefill: &[InstanceAddress],
        decode: &[InstanceAddress],
    ) -> Result<Self, InstanceAddress> {
        let mut all: Vec<(InstanceAddress, Role)> = Vec::new();
        for (addresses, role) in [(prefill, Role::Prefill), (decode, Role::Decode)] {
            for address in addresses {
                match all.iter_mut().find(|(a, _)| a.is_same(address)) {
                    Some((_, known)) if known.does(role) => return Err(address.clone()),
                    Some((_, known)) => *known = Role::Both,
                    None => all.push((address.clone(), role)),
                }
            }
        }
        Ok(Self(all))
    }

    /// What an instance is still, other than files say.
    fn keep(&mut self, address: &InstanceAddress, role: Role) {
        if let Some((_, named)) = self.0.iter_mut().find(|(a, _)| a.is_same(address)) {
            *named = role;
        }
    }

    fn role(&self, address: &InstanceAddress) -> Option<Role> {
        let found = self.0.iter().find(|(a, _)| a.is_same(address));
        found.map(|(_, role)| *role)
    }
}

fn new(app: &App, address: &InstanceAddress, role: Role) -> NewInstance {
    let mut new = NewInstance::plain(address.clone(), role);
    new.connector = app.config.connector;
    new.events = EventsRule::of(&app.config.kv_events, address);
    new
}

/// Takes up the instances of the configuration.
///
/// # Errors
/// [`StartError::Twice`].
pub(crate) fn begin(app: &Arc<App>) -> Result<(), StartError> {
    let named = Named::of(&app.config.prefill, &app.config.decode).map_err(StartError::Twice)?;
    for (address, role) in &named.0 {
        app.add(new(app, address, *role))
            .map_err(|_| StartError::Twice(address.clone()))?;
    }
    *app.named.lock() = named;
    Ok(())
}

/// An instance that came otherwise has gone: if files name it, it is theirs now.
pub(crate) fn come_back(app: &Arc<App>, address: &InstanceAddress) {
    let role = app.named.lock().role(address);
    if let Some(role) = role {
        let _ = app.add(new(app, address, role));
    }
}

/// See [`super::Proxy::reload`].
pub(crate) fn reload(app: &Arc<App>, prefill: &[InstanceAddress], decode: &[InstanceAddress]) {
    let named = match Named::of(prefill, decode) {
        Ok(named) => named,
        Err(twice) => {
            tracing::error!(instance = %twice, "not reloaded: it is named twice");
            return;
        }
    };
    let before = std::mem::replace(&mut *app.named.lock(), named.clone());
    for instance in app.registry.all().iter() {
        if instance.origin == Origin::Named && named.role(&instance.address).is_none() {
            tracing::info!(instance = %instance.name, "removed by reload");
            app.remove(instance);
        }
    }
    let mut changed: Vec<(Arc<Instance>, Role)> = Vec::new();
    for (address, role) in &named.0 {
        match app.registry.find(address) {
            None => {
                if app.add(new(app, address, *role)).is_ok() {
                    tracing::info!(instance = %address, role = role.name(), "added by reload");
                }
            }
            Some(there) if there.origin != Origin::Named => {
                tracing::info!(instance = %address, origin = there.origin.name(), role = there.role().name(), "reload leaves it as it is");
            }
            Some(there) if before.role(address) != Some(*role) => changed.push((there, *role)),
            Some(_) => {}
        }
    }
    while let Some((first, role)) = changed.first().cloned() {
        let (server, left) = changed
            .into_iter()
            .partition(|(i, r)| *r == role && i.address.is_same_server(&first.address));
        changed = left;
        let server: Vec<(Arc<Instance>, Role)> = server;
        let server: Vec<Arc<Instance>> = server.into_iter().map(|(i, _)| i).collect();
        let app = app.clone();
        tokio::spawn(async move {
            let done = role::change(&app, &server, role, ROLE_DEADLINE).await;
            match done {
                Ok(_) => {
                    tracing::info!(instance = %first.name, role = role.name(), "role changed by reload")
                }
                Err(error) => {
                    tracing::error!(instance = %first.name, role = role.name(), %error, "reload could not change its role: the next one tries again");
                    let mut named = app.named.lock();
                    server.iter().for_each(|i| named.keep(&i.address, i.role()));
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_both_lists_is_both() {
        let of = |text: &str| InstanceAddress::parse_list(text).unwrap();
        let named = Named::of(&of("a:1 b:1"), &of("b:1 c:1")).unwrap();
        let role = |text: &str| named.role(&InstanceAddress::parse(text).unwrap());
        assert_eq!(role("a:1"), Some(Role::Prefill));
        assert_eq!(role("b:1"), Some(Role::Both));
        assert_eq!(role("c:1"), Some(Role::Decode));
        assert_eq!(role("d:1"), None);
        assert!(Named::of(&of("a:1 a:1"), &[]).is_err());
    }
}
