//! From Python's arguments to the library's, with upstream's tolerance: keys are `str` (or `bytes`), addresses are ints,
//! lists may be any sequence. What has the wrong type is a `TypeError` that says which argument.

use mooncake::store::model::error::StoreError;
use pyo3::exceptions::{PyBufferError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString};

/// Items of one argument: an iterator may have no end.
const ITEMS_MAX: usize = 4 << 20;

/// One key. Holds the argument, so that it may outlive the call that brought it.
pub(crate) struct Key {
    // Dropped without the interpreter lock, its reference is given back when somebody next holds the lock.
    _owner: Py<PyAny>,
    pointer: *const u8,
    length: usize,
}

// SAFETY: text (its cached UTF-8 form) and bytes are immutable and stay where they are as long as their object lives.
unsafe impl Send for Key {}
// SAFETY: as above.
unsafe impl Sync for Key {}

impl<'a, 'py> FromPyObject<'a, 'py> for Key {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let place = |bytes: &[u8]| (bytes.as_ptr(), bytes.len());
        let (pointer, length) = if let Ok(text) = object.cast::<PyString>() {
            // Fails for lone surrogates.
            let wrong = |_| PyTypeError::new_err("a key must be text that UTF-8 can express");
            place(text.to_str().map_err(wrong)?.as_bytes())
        } else if let Ok(bytes) = object.cast::<PyBytes>() {
            place(bytes.as_bytes())
        } else {
            let kind = object.get_type().name()?;
            return Err(PyTypeError::new_err(format!(
                "a key must be str, not {kind}"
            )));
        };
        Ok(Self {
            _owner: object.to_owned().unbind(),
            pointer,
            length,
        })
    }
}

impl Key {
    /// Its bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the owner keeps them, unchanged, where they are.
        unsafe { std::slice::from_raw_parts(self.pointer, self.length) }
    }
}

/// A sequence of keys.
pub(crate) struct Keys(Vec<Key>);

impl<'a, 'py> FromPyObject<'a, 'py> for Keys {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if object.cast::<PyString>().is_ok() || object.cast::<PyBytes>().is_ok() {
            return Err(PyTypeError::new_err("keys must be a list of str"));
        }
        Ok(Self(sequence(object, "keys")?))
    }
}

impl Keys {
    /// Their bytes, in order.
    pub(crate) fn bytes(&self) -> Vec<&[u8]> {
        self.0.iter().map(Key::bytes).collect()
    }
    /// An empty list.
    pub(crate) fn none() -> Self {
        Self(Vec::new())
    }
    /// A list of one.
    pub(crate) fn one(key: Key) -> Self {
        Self(vec![key])
    }
    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

fn sequence<'a, 'py, T>(object: Borrowed<'a, 'py, PyAny>, what: &str) -> PyResult<Vec<T>>
where
    T: for<'x> FromPyObject<'x, 'py, Error = PyErr>,
{
    let each = |item: Bound<'py, PyAny>| T::extract(item.as_borrowed());
    if let Ok(list) = object.cast::<PyList>() {
        return list.iter().map(each).collect();
    }
    let wrong = || PyTypeError::new_err(format!("{what} must be a list"));
    let items = object.try_iter().map_err(|_| wrong())?;
    // What it says of its length is not believed: memory is taken as items come, and not without end.
    let mut list = Vec::new();
    for item in items {
        if list.len() == ITEMS_MAX {
            return Err(PyValueError::new_err(format!(
                "{what}: more than {ITEMS_MAX} items"
            )));
        }
        list.push(each(item?)?);
    }
    Ok(list)
}

/// A list of anything.
pub(crate) struct List<T>(pub(crate) Vec<T>);

impl<'a, 'py, T> FromPyObject<'a, 'py> for List<T>
where
    T: for<'x> FromPyObject<'x, 'py, Error = PyErr>,
{
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        if object.cast::<PyString>().is_ok() {
            return Err(PyTypeError::new_err("a list is wanted, not one str"));
        }
        sequence(object, "the argument").map(Self)
    }
}

/// An address or a number of bytes. Negative or larger than 64 bits is a `TypeError`.
#[derive(Clone, Copy)]
pub(crate) struct Word(pub(crate) usize);

impl<'a, 'py> FromPyObject<'a, 'py> for Word {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        object.extract::<usize>().map(Self).map_err(|_| {
            let shown = object
                .repr()
                .map_or_else(|_| "?".to_owned(), |r| r.to_string());
            PyTypeError::new_err(format!(
                "addresses and sizes must be ints from 0 to 2**64 - 1, not {shown}"
            ))
        })
    }
}

/// A list of addresses or sizes.
pub(crate) struct Words(pub(crate) Vec<usize>);

impl<'a, 'py> FromPyObject<'a, 'py> for Words {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let words: Vec<Word> = sequence(object, "addresses and sizes")?;
        Ok(Self(words.into_iter().map(|w| w.0).collect()))
    }
}

/// A list of lists of addresses or sizes.
pub(crate) struct WordLists(pub(crate) Vec<Words>);

impl<'a, 'py> FromPyObject<'a, 'py> for WordLists {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        sequence(object, "the list of lists").map(Self)
    }
}

/// The bytes of any contiguous exporter of the buffer protocol. The caller must not change them during the call.
pub(crate) struct Value {
    // Holds the export; released with the lock held when this is dropped.
    export: Box<ffi::Py_buffer>,
    pub(crate) pointer: *mut u8,
    pub(crate) length: usize,
}

// SAFETY: the export keeps the memory where it is whichever thread looks at it; it is released under the lock.
unsafe impl Send for Value {}
// SAFETY: as above.
unsafe impl Sync for Value {}

impl Drop for Value {
    fn drop(&mut self) {
        // An interpreter that is ending takes it with it.
        // SAFETY: got once in `extract`; attaching is a no-op for the thread that holds the lock.
        let _ = Python::try_attach(|_| unsafe { ffi::PyBuffer_Release(&raw mut *self.export) });
    }
}

impl<'a, 'py> FromPyObject<'a, 'py> for Value {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        // SAFETY: a C structure of integers and pointers.
        let mut export: Box<ffi::Py_buffer> = Box::new(unsafe { std::mem::zeroed() });
        // SAFETY: the object lives, the lock is held. Plain bytes are asked for: exporters without strides (ctypes) give
        // them, and one that is not contiguous refuses.
        let code = unsafe {
            ffi::PyObject_GetBuffer(object.as_ptr(), &raw mut *export, ffi::PyBUF_SIMPLE)
        };
        if code == 0 {
            return Ok(Self {
                pointer: export.buf.cast(),
                length: export.len.max(0) as usize,
                export,
            });
        }
        let refused = PyErr::fetch(object.py());
        if refused.is_instance_of::<PyBufferError>(object.py()) {
            return Err(PyTypeError::new_err(
                "a value must be contiguous: make a copy first",
            ));
        }
        let kind = object
            .get_type()
            .name()
            .map_or_else(|_| "?".to_owned(), |n| n.to_string());
        Err(PyTypeError::new_err(format!(
            "a value must be bytes-like, not {kind}"
        )))
    }
}

/// Several values.
pub(crate) struct Values(pub(crate) Vec<Value>);

impl<'a, 'py> FromPyObject<'a, 'py> for Values {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        sequence(object, "values").map(Self)
    }
}

/// Upstream's answer for an error. An empty key is `INVALID_PARAMS` there.
pub(crate) fn code(error: &StoreError) -> i32 {
    match error {
        StoreError::InvalidKey { length: 0 } => -600,
        other => other.code(),
    }
}
